"""Layout -> parameters: tensors streamed from disk, quantised on arrival.

This file decides the order of reading (that of the files, so nothing is read twice), the
dtype in which each tensor is held, and that what arrives is finite. At most two tensors are in
memory beside the model: the one that is placed and the next, which is read and hashed
meanwhile. The digests of the bytes are made on the way: they are the
fingerprint of the base that an adapter is bound to.

dtype held: linear maps, embedding and head in the run's dtype; ``Store.FP32`` rows always in
float32; everything else in the dtype of the file, and blocks cast where they compute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, Header
from .errors import InputError, NumericError
from .locate import Layout, Located
from .model import Model
from .nn.linear import Linear
from .table import Store

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip

Progress = Callable[[int], None]  #: called with the bytes read since the last call


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def read_exact(file: IO[bytes], view: memoryview, header: Header) -> None:
    """Fill `view` from where `file` stands. Raises ``QC-CKPT-005`` when the file ends before."""
    got = file.readinto(view)  # type: ignore[attr-defined]
    if got != len(view):
        raise InputError(
            "QC-CKPT-005",
            "is damaged",
            file=file.name,
            field=header.name,
            found=f"{got} bytes",
            expected=len(view),
            fix="download the file again",
        )


def digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def read_tensor(checkpoint: Checkpoint, item: Located) -> Tensor:
    """A canonical tensor on the CPU in its dtype on disk.

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
    whole = torch.empty(item.tensor.shape, dtype=dtype)
    for place in item.places:
        header = place.header
        piece = torch.empty(header.shape, dtype=dtype) if len(item.places) > 1 else whole
        with checkpoint.file(header.file).open("rb") as file:
            file.seek(header.start)
            read_exact(file, as_bytes(piece), header)
        if piece is not whole:
            whole[place.region] = piece.view(whole[place.region].shape)
    return whole


def load(
    model: Model,
    layout: Layout,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    quantize: bool,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Fill a model on meta; returns the digests of what was read, by canonical name.

    Raises:
        InputError: ``QC-LOAD-002`` when a tied tensor is on disk with other values.
        NumericError: ``QC-LOAD-003`` for a NaN or an infinity in the base.
    """
    modules = dict(model.named_modules())
    wanted = [
        item for item in layout.located.values() if item.tensor.part.loaded and item.tied is None
    ]
    wanted.sort(key=lambda item: (item.places[0].header.file, item.places[0].header.start))
    digests: dict[str, str] = {}
    for item, (value, found) in zip(wanted, _read_ahead(checkpoint, wanted)):
        digests[item.tensor.name] = found
        if progress is not None:
            progress(value.nbytes)
        value = value.to(device)
        if not _finite(value):
            raise NumericError(
                "QC-LOAD-003",
                "holds a value that is not finite",
                file=checkpoint.path,
                field=item.tensor.name,
                fix="download the checkpoint again",
            )
        if item.tensor.name not in layout.ties:
            place(model, modules, item, value, quantize=quantize)
    for name, tie in layout.ties.items():
        if digests.get(name) != digests.get(tie):
            raise InputError(
                "QC-LOAD-002",
                f"differs from '{tie}', to which config.json ties it",
                file=checkpoint.path,
                field=name,
                fix="set tie_word_embeddings to false, or restore the weights",
            )
    return digests


def _finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite; in blocks, because each makes three of its size."""
    return all(bool(block.isfinite().all()) for block in torch.split(value.flatten(), 2**24))


def _read_ahead(checkpoint: Checkpoint, items: list[Located]) -> Iterator[tuple[Tensor, str]]:
    """Read and hash the next tensor while the current one is quantised."""

    def read(item: Located) -> tuple[Tensor, str]:
        value = read_tensor(checkpoint, item)
        return value, digest(value)

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read, items[0])
        for following in items[1:]:
            current = ahead.result()
            ahead = pool.submit(read, following)
            yield current
        yield ahead.result()


def place(
    model: Model,
    modules: Mapping[str, nn.Module],
    item: Located,
    value: Tensor,
    *,
    quantize: bool,
) -> None:
    """Give a loaded tensor to the module that holds it, in the dtype that its row asks for."""
    name, row = item.tensor.name, item.tensor.row
    module = modules.get(name.removesuffix(".weight"))
    if isinstance(module, Linear):
        module.hold(value, quantize=quantize and row.store is Store.NF4, dtype=model.dtype)
        return
    parent, _, leaf = name.rpartition(".")
    if row.store is Store.FP32 or model.dtype == torch.float32:
        value = value.float()
    elif row.group in ("embed", "head"):
        value = value.to(model.dtype)
    modules[parent]._parameters[leaf] = nn.Parameter(value, requires_grad=False)
