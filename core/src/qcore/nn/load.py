"""Loading weights: tensors streamed from disk into a model on meta, quantized on arrival.

This file decides the order of reading (that of the files, so nothing is read twice), how much of a
tensor is in memory (all of it; of a stack of experts a few), the dtype in which each is held, that
values are finite, and which weights are constant. Beside the model at most two such slabs are in
memory: the one that is being placed, and the next one, which is read and hashed meanwhile. The
digests of the values are computed on the way; they make the fingerprint of the base that an adapter
is bound to.

dtype held: maps, embedding and head in the run's dtype; ``Store.FP32`` rows always in float32;
everything else in the dtype of the file, and blocks cast where they compute.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..api.parameters import Kind, Region, Store
from ..checkpoint.checkpoint import Checkpoint, Header
from ..checkpoint.layout import Layout, Located, Place
from ..checkpoint.tensor_hash import TensorDigest
from ..errors import InputError, NumericError
from .four_bit import StoredCodes, decode, nf4_state, on_device, read_codes, read_four_bit
from .fp8 import dequantize
from .model import Model
from .qlora.linear import Linear
from .tensor_bytes import DTYPES, as_bytes, read_exact
from .value_range import value_range

__all__ = [
    "DTYPES", "as_bytes", "hash_units", "load", "place", "read_exact", "read_fp8", "read_tensor",
    "slabs",
]  # fmt: skip

_T = TypeVar("_T")
SLAB = 2**28  #: bytes of a stack of experts that are in memory at a time

Progress = Callable[[int], None]  #: called with the bytes read since the last call
#: Returns the values to hold for ``(canonical name, tensor[region], region)``.
Change = Callable[[str, Tensor, Region], Tensor]
Constant = Callable[[str, float], None]  #: called with a matrix whose values are all equal


def slabs(item: Located, size: int = SLAB) -> Iterator[slice]:
    """The ranges of dim 0 in which a tensor is read: `size` bytes of a stack, else all."""
    count = item.tensor.shape[0]
    step = count
    if item.tensor.row.kind is Kind.EXPERTS:
        each = item.tensor.numel // count * DTYPES.get(item.dtype, torch.float32).itemsize
        step = max(1, size // each)
    for at in range(0, count, step):
        yield slice(at, min(at + step, count))


def read_tensor(checkpoint: Checkpoint, item: Located, rows: slice | None = None) -> Tensor:
    """A canonical tensor, or ``[rows]`` of it (dim 0), on the CPU in its dtype on disk.

    What lies in FP8 with block scales comes in bfloat16, what bitsandbytes stored in 4 bits in the
    dtype that it had before. Rows that the run adds are zero.

    Raises:
        InputError: ``QC-LOAD-001`` for a dtype that needs a codec which is not there.
    """
    dtype = DTYPES.get(item.dtype)
    if dtype is None:
        header = item.places[0].header
        raise InputError(
            "QC-LOAD-001",
            "is stored in a dtype that cannot be trained from",
            file=checkpoint.path / header.file,
            field=header.name,
            found=item.dtype,
            expected=", ".join(DTYPES),
            fix="use the bf16 revision of this checkpoint",
        )
    shape = item.tensor.shape
    rows = rows or slice(0, shape[0])
    whole = torch.empty((rows.stop - rows.start, *shape[1:]), dtype=dtype)
    whole[max(0, item.stored.shape[0] - rows.start) :] = 0  # added rows, which no file has
    for place in item.places:
        lies = place.region[0]
        start, stop = max(lies.start, rows.start), min(lies.stop, rows.stop)
        if start >= stop:
            continue
        region = (slice(start - rows.start, stop - rows.start), *place.region[1:])
        _read_piece(checkpoint, place, slice(start - lies.start, stop - lies.start), whole[region])
    return whole


def _read_piece(checkpoint: Checkpoint, place: Place, rows: slice, into: Tensor) -> None:
    """Rows of one tensor on disk, counted in its region, into their place in memory."""
    header = place.header
    count = place.region[0].stop - place.region[0].start
    if place.four_bit is not None:
        value = read_four_bit(checkpoint, place.four_bit)
        shape = [part.stop - part.start for part in place.region]
        into.copy_(value.view(shape)[rows])
        return
    if place.scale is not None:
        assert place.block is not None
        alike = header.shape[0] == count  # else this is one expert, of which all is read
        value = read_fp8(checkpoint, header, place.scale, place.block, rows if alike else None)
        into.copy_(value.view(into.shape))
        return
    each = (header.end - header.start) // count
    value = into if into.is_contiguous() else torch.empty(into.shape, dtype=into.dtype)
    with checkpoint.file(header.file).open("rb") as file:
        file.seek(header.start + rows.start * each)
        read_exact(file, as_bytes(value), header)
    if value is not into:
        into.copy_(value)


def read_fp8(
    checkpoint: Checkpoint,
    header: Header,
    scale: Header,
    block: tuple[int, int],
    rows: slice | None = None,
) -> Tensor:
    """A tensor on disk that lies in block FP8, or ``[rows]`` of it, decoded to bfloat16.

    Raises:
        NumericError: ``QC-LOAD-003`` for a scale that is not finite.
    """
    if rows is None or len(header.shape) < 2:
        rows, first, drop = slice(0, header.shape[0]), slice(0, scale.shape[0]), 0
    else:
        step = block[0] if len(header.shape) == 2 else 1  # rows that share their scales
        first = slice(rows.start // step, -(-rows.stop // step))
        drop = rows.start - first.start * step
    weight = _rows(checkpoint, header, slice(rows.start - drop, rows.stop), torch.float8_e4m3fn)
    scales = _rows(checkpoint, scale, first, DTYPES[scale.dtype])
    if not bool(scales.isfinite().all()):
        raise NumericError(
            "QC-LOAD-003",
            "holds a scale that is not finite",
            file=checkpoint.path / scale.file,
            field=scale.name,
            fix="download the checkpoint again",
        )
    return dequantize(weight, scales, block, torch.bfloat16)[drop:]


def _rows(checkpoint: Checkpoint, header: Header, rows: slice, dtype: torch.dtype) -> Tensor:
    """``[rows]`` of a tensor on disk as it lies there."""
    value = torch.empty((rows.stop - rows.start, *header.shape[1:]), dtype=dtype)
    with checkpoint.file(header.file).open("rb") as file:
        file.seek(header.start + rows.start * ((header.end - header.start) // header.shape[0]))
        read_exact(file, as_bytes(value), header)
    return value


def hash_units(digest: TensorDigest, region: Region, value: Tensor) -> Iterator[tuple[int, bytes]]:
    """Digests of the units of a tensor that lie within ``value = tensor[region]``."""
    value = value.view([part.stop - part.start for part in region])
    for number, unit in digest.inside(region):
        yield number, hashlib.sha256(as_bytes(value[unit].contiguous())).digest()


@dataclass(frozen=True, slots=True)
class Slab:
    """``tensor[rows]`` of a located tensor, and the tensor's digest with its last slab.

    `codes` are set for a weight in 4 bits that NF4 storage holds as it is.
    """

    item: Located
    rows: slice
    value: Tensor
    digest: str | None
    codes: StoredCodes | None = None

    @property
    def region(self) -> Region:
        """Slices of the canonical tensor that `value` holds."""
        return (self.rows, *(slice(0, n) for n in self.item.tensor.shape[1:]))


def load(
    model: Model,
    layout: Layout,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    quantize: bool,
    progress: Progress | None = None,
    change: Change | None = None,
    constant: Constant | None = None,
) -> dict[str, str]:
    """Fill a model on meta; returns the digests of what was read, by canonical name.

    With `change`, other values are held than those that were read and hashed. A weight that
    bitsandbytes stored in 4 bits keeps its codes where it is to be quantized.

    `constant` is called with each linear map, stack of experts, embedding and head whose values are
    all equal: no such weight was trained.

    A tied tensor that is on disk nevertheless is not read: `qcore.checkpoint.ties` has compared it.

    Raises:
        NumericError: ``QC-LOAD-003`` for a NaN or an infinity in the base.
    """
    modules = dict(model.named_modules())
    wanted = loaded_items(layout)
    digests: dict[str, str] = {}
    ranges = Ranges(constant)
    for slab in read_ahead(checkpoint, wanted):
        name, value = slab.item.tensor.name, slab.value
        if slab.digest is not None:
            digests[name] = slab.digest
        if progress is not None:
            progress(value.nbytes)
        in_nf4 = quantize and layout.held(name) is Store.NF4
        if change is not None:
            value = change(name, value, slab.region)
        if in_nf4 and slab.codes is not None and value is slab.value:
            ranges.add(slab.item, value, last=slab.digest is not None)  # finite, as their scales
            hold_codes(model, name, slab.codes, device)
            continue
        value = value.to(device)
        if not ranges.add(slab.item, value, last=slab.digest is not None):
            raise not_finite(checkpoint, name)
        place(model, modules, slab.item, slab.rows, value, quantize=in_nf4)
    assert len(digests) == len(wanted), "every tensor has a digest, or the base has no fingerprint"
    return digests


def loaded_items(layout: Layout) -> list[Located]:
    """The tensors that are read, in the order of the files."""
    wanted = [
        item
        for item in layout.located.values()
        if layout.loads(item.tensor.part)
        and item.tied is None
        and item.tensor.name not in layout.ties
    ]
    return sorted(
        wanted, key=lambda item: (item.places[0].header.file, item.places[0].header.start)
    )


def not_finite(checkpoint: Checkpoint, name: str) -> NumericError:
    """The error of a base with a NaN or an infinity in the tensor `name`."""
    return NumericError(
        "QC-LOAD-003",
        "holds a value that is not finite",
        file=checkpoint.path,
        field=name,
        fix="download the checkpoint again",
    )


def holds_codes(item: Located) -> bool:
    """Whether NF4 storage takes over the codes of a weight that is in 4 bits on disk."""
    weight = item.four_bit
    return weight is not None and weight.is_nf4_storage and item.tensor.row.kind is Kind.LINEAR


def _read_slab(
    checkpoint: Checkpoint, item: Located, rows: slice
) -> tuple[Tensor, StoredCodes | None]:
    """The values of a slab, and its codes if NF4 storage holds them."""
    weight = item.four_bit
    if weight is None or not holds_codes(item):
        return read_tensor(checkpoint, item, rows), None
    codes = read_codes(checkpoint, weight)
    return decode(weight, codes), codes


def hold_codes(model: Model, name: str, codes: StoredCodes, device: torch.device) -> None:
    """Give a module the codes of its weight."""
    holder = model.lora_layers[name]
    assert isinstance(holder, Linear)
    codes = on_device(codes, device)
    holder.hold_codes(codes.packed, nf4_state(codes, model.dtype))


class Ranges:
    """The range of values of the tensor that is being read, slab by slab.

    Args:
        constant: called with each matrix whose values are all equal.
    """

    def __init__(self, constant: Constant | None) -> None:
        self._constant = constant
        self._least, self._most = math.inf, -math.inf

    def add(self, item: Located, value: Tensor, *, last: bool) -> bool:
        """Add values of a tensor, and with the last judge it; returns whether they are finite."""
        least, most = value_range(value)
        self._least, self._most = min(self._least, least), max(self._most, most)
        if last:
            self.judge(item, self._least, self._most)
            self._least, self._most = math.inf, -math.inf
        return math.isfinite(least) and math.isfinite(most)

    def judge(self, item: Located, least: float, most: float) -> None:
        """Call `constant` for a matrix whose values are all equal."""
        row = item.tensor.row
        matrix = row.kind is not None or row.group in ("embed", "head")
        if matrix and least == most and self._constant is not None:
            self._constant(item.tensor.name, least)


def read_ahead(checkpoint: Checkpoint, items: list[Located]) -> Iterator[Slab]:
    """Read and hash the next slab while the current one is quantized."""

    def read() -> Iterator[Slab]:
        for item in items:
            digest = TensorDigest(item.stored)
            for rows in slabs(item):
                value, codes = _read_slab(checkpoint, item, rows)
                stored = slice(rows.start, min(rows.stop, item.stored.shape[0]))
                region = (stored, *(slice(0, n) for n in item.tensor.shape[1:]))
                own = value[: stored.stop - stored.start]
                for number, sha256 in hash_units(digest, region, own):
                    digest.put(number, sha256)
                yield Slab(item, rows, value, digest.hex, codes)

    yield from one_ahead(read())


def one_ahead(coming: Iterator[_T]) -> Iterator[_T]:
    """The same items; the next is made in a thread while the current one is in use."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, coming, None)
        while (current := ahead.result()) is not None:
            ahead = pool.submit(next, coming, None)
            yield current


def place(
    model: Model,
    modules: Mapping[str, nn.Module],
    item: Located,
    rows: slice,
    value: Tensor,
    *,
    quantize: bool,
) -> None:
    """Give what was loaded to the module that holds it, in 4 bit or in the dtype of its row."""
    name, row = item.tensor.name, item.tensor.row
    holder = model.lora_layers.get(name)
    if holder is not None:
        holder.hold(rows, value, quantize=quantize, dtype=model.dtype)
        return
    parent, _, leaf = name.rpartition(".")
    if row.store is Store.FP32 or model.dtype == torch.float32:
        value = value.float()
    elif row.group in ("embed", "head"):
        value = value.to(model.dtype)
    modules[parent]._parameters[leaf] = nn.Parameter(value, requires_grad=False)
