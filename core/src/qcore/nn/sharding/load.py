"""Loads a sharded base: each rank reads, checks and quantizes its own rows.

This file decides what a rank reads: its rows of a sharded tensor, and all of a replicated one. A
tensor other than a stack of experts has one digest over all of its bytes, so one rank reads it
whole to hash it; `rows.appointed` spreads these. No rank reads a byte twice, nor holds more of a
sharded tensor than its rows once the next one is read. Codes equal those of the whole weight bit
for bit: the ranks exchange the float32 scales of its blocks before these are quantized (`base`).

`qcore.nn.load` decides the order, the checks and the dtypes. What the ranks learn of a tensor
(digests of its parts, the range of its values) is exchanged once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...api.parameters import Kind, Store
from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.layout import Layout, Located
from ...checkpoint.tensor_hash import TensorDigest
from ...errors import QcoreError
from ...io.stop_signals import StopNow, StopSignals
from ...parallel.agreement import together
from ..device import is_out_of_memory
from ..four_bit import StoredCodes, decode, on_device, read_codes
from ..load import (
    SLAB,
    Constant,
    Progress,
    Ranges,
    hash_units,
    hold_codes,
    holds_codes,
    loaded_items,
    not_finite,
    one_ahead,
    place,
    read_tensor,
    slabs,
)
from ..model import Model
from ..value_range import value_range
from .base import RankFailed, ShardedBase
from .rows import appointed


@dataclass(frozen=True, slots=True)
class _Part:
    """What was read of a tensor, cut to what this rank holds.

    Attributes:
        item: the tensor.
        rows: those of `value`.
        value: ``tensor[rows]``; no values where codes are held and another rank hashes them.
        read: bytes that were read.
        digest: of the tensor, as far as this rank knows it.
        last: whether no other part of it follows.
        codes: where NF4 storage takes them over; of a sharded weight the packed ones of `rows`.
    """

    item: Located
    rows: slice
    value: Tensor
    read: int
    digest: TensorDigest
    last: bool
    codes: StoredCodes | None = None


def load_shards(
    base: ShardedBase,
    model: Model,
    layout: Layout,
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    quantize: bool,
    progress: Progress | None = None,
    constant: Constant | None = None,
    stop: StopSignals | None = None,
) -> dict[str, str]:
    """Fill a model whose layers are sharded; returns the digests of the base on every rank.

    Args and Raises as `qcore.nn.load.load`; a rank checks what it holds. A signal of `stop` acts
    between two tensors, so that no rank leaves an exchange that the others are in.
    """
    stop = stop or StopSignals()
    loading = _Loading(base, model, layout, checkpoint, device, quantize, constant)
    # Ends every rank with the error of the one that failed, which the others only know of.
    with together(base.world), suppress(RankFailed):
        try:
            for part in one_ahead(_read(checkpoint, loading.items, base)):
                with stop.abandoning():
                    pass
                if progress is not None:
                    progress(part.read)
                loading.take(part)
        except (QcoreError, StopNow, RuntimeError, MemoryError) as error:
            if isinstance(error, QcoreError | StopNow) or is_out_of_memory(error):
                loading.fail()
            raise
        loading.exchange()
    return loading.digests


def share_of_bytes(base: ShardedBase, layout: Layout) -> int:
    """Bytes on disk that this rank reads."""
    items, total = loaded_items(layout), 0.0
    hashed_by = _hashed_by(items, base)
    for item in items:
        name, nbytes = item.tensor.name, _nbytes(item)
        rows = base.rows(name)
        whole = rows is None or hashed_by.get(name) == base.world.rank
        share = 1.0 if whole or rows is None else (rows.stop - rows.start) / item.tensor.shape[0]
        total += nbytes * share
    return round(total)


class _Loading:
    """Places what this rank reads, and what it knows of each tensor.

    Attributes:
        items: the tensors, in the order of the files.
        digests: of the tensors whose digest this rank knows, all of them after `exchange`.
    """

    def __init__(
        self,
        base: ShardedBase,
        model: Model,
        layout: Layout,
        checkpoint: Checkpoint,
        device: torch.device,
        quantize: bool,
        constant: Constant | None,
    ) -> None:
        self.items = loaded_items(layout)
        self._base, self._model, self._layout = base, model, layout
        self._checkpoint, self._device, self._quantize = checkpoint, device, quantize
        self._modules = dict(model.named_modules())
        self._ranges = Ranges(constant)
        self.digests: dict[str, str] = {}
        self._shared: dict[str, _Shared] = {}

    def take(self, part: _Part) -> None:
        """Check and place a part; a sharded tensor's rows go to the base."""
        name, value = part.item.tensor.name, part.value
        codes = part.codes if self._in_nf4(name) else None
        if self._base.rows(name) is None:
            self._take_whole(part, codes)
            return
        known = self._shared.setdefault(name, _Shared(part.digest))
        if codes is not None:
            known.add(value)  # finite, as their scales are
            self._base.put_codes(name, on_device(codes, self._device))
            return
        value = value.to(self._device)
        if not known.add(value):
            raise not_finite(self._checkpoint, name)
        self._base.put(name, part.rows, value)

    def _take_whole(self, part: _Part, codes: StoredCodes | None) -> None:
        """Check and place what every rank holds."""
        item, name, value = part.item, part.item.tensor.name, part.value
        if part.last:
            digest = part.digest.hex
            assert digest is not None
            self.digests[name] = digest
        if codes is not None:
            self._ranges.add(item, value, last=part.last)
            hold_codes(self._model, name, codes, self._device)
            return
        value = value.to(self._device)
        if not self._ranges.add(item, value, last=part.last):
            raise not_finite(self._checkpoint, name)
        in_nf4 = self._in_nf4(name)
        place(self._model, self._modules, item, part.rows, value, quantize=in_nf4)

    def fail(self) -> None:
        """Tell the others, in their next exchange, that this rank does not go on."""
        for item in self.items:
            if self._is_exchanged(item) and item.tensor.name not in self._base.exchanged:
                self._base.fail(item.tensor.name)
                return
        self._base.world.gather(None)

    def exchange(self) -> None:
        """Join what the ranks know: digests of tensors, and which are constant."""
        own = {
            name: (
                [(number, unit.hex()) for number, unit in known.digest.known.items()],
                [known.least, known.most] if known.least <= known.most else [],
            )
            for name, known in self._shared.items()
        }
        everyone: list[Any] = self._base.world.gather(own)
        if None in everyone:
            raise RankFailed
        for item in self.items:
            name = item.tensor.name
            if name not in self._shared:
                continue
            digest, spans = TensorDigest(item.stored), []
            for known in everyone:
                units, span = known[name]
                spans += span
                for number, unit in units:
                    digest.put(number, bytes.fromhex(unit))
            joined = digest.hex
            assert joined is not None, "every tensor has a digest"
            self.digests[name] = joined
            if spans:
                self._ranges.judge(item, min(spans), max(spans))

    def _in_nf4(self, name: str) -> bool:
        return self._quantize and self._layout.held(name) is Store.NF4

    def _is_exchanged(self, item: Located) -> bool:
        """Whether the ranks exchange the scales of this tensor."""
        name = item.tensor.name
        linear = item.tensor.row.kind is Kind.LINEAR and not holds_codes(item)
        return linear and self._in_nf4(name) and self._base.rows(name) is not None


class _Shared:
    """What one rank knows of a sharded tensor: digests of units, and the range of its values."""

    def __init__(self, digest: TensorDigest) -> None:
        self.digest = digest
        self.least, self.most = math.inf, -math.inf

    def add(self, value: Tensor) -> bool:
        """Add values; returns whether they are finite."""
        if not value.numel():
            return True
        least, most = value_range(value)
        self.least, self.most = min(self.least, least), max(self.most, most)
        return math.isfinite(least) and math.isfinite(most)


def _read(checkpoint: Checkpoint, items: Sequence[Located], base: ShardedBase) -> Iterator[_Part]:
    """What this rank reads, in the order of the files."""
    hashed_by = _hashed_by(items, base)
    for item in items:
        name = item.tensor.name
        own, digest = base.rows(name), TensorDigest(item.stored)
        if own is not None and _one_digest(item):
            yield _read_rows(
                checkpoint, item, own, digest, hashes=hashed_by[name] == base.world.rank
            )
            continue
        parts = list(slabs(item, SLAB)) if own is None else list(_slabs_of(item, own))
        for rows in parts:
            last = rows is parts[-1]
            yield _read_part(checkpoint, item, rows, digest, last)


def _read_rows(
    checkpoint: Checkpoint, item: Located, own: slice, digest: TensorDigest, *, hashes: bool
) -> _Part:
    """This rank's rows of a tensor that is hashed whole, by this rank or by another one."""
    every = slice(0, item.tensor.shape[0])
    if holds_codes(item):
        weight = item.four_bit
        assert weight is not None
        codes = read_codes(checkpoint, weight, None if hashes else own)
        read = codes.packed.nbytes + codes.absmax.nbytes
        value = torch.empty(0)
        if hashes:
            value = decode(weight, codes)
            _hash(item, digest, every, value)
            packed = codes.packed.view(every.stop, -1)[own].reshape(-1, 1)
            codes = codes._replace(packed=packed.clone())
        return _Part(item, own, value, read, digest, True, codes)
    rows = every if hashes else own
    value = read_tensor(checkpoint, item, rows)
    read = value.nbytes
    if hashes:
        _hash(item, digest, every, value)
        value = value[own].clone()
    return _Part(item, own, value, read, digest, True)


def _read_part(
    checkpoint: Checkpoint, item: Located, rows: slice, digest: TensorDigest, last: bool
) -> _Part:
    """Some rows of a tensor whose units they are."""
    codes = None
    if holds_codes(item):
        assert item.four_bit is not None
        codes = read_codes(checkpoint, item.four_bit)
        value = decode(item.four_bit, codes)
    else:
        value = read_tensor(checkpoint, item, rows)
    _hash(item, digest, rows, value)
    return _Part(item, rows, value, value.nbytes, digest, last, codes)


def _hash(item: Located, digest: TensorDigest, rows: slice, value: Tensor) -> None:
    """Set the digests of the units that lie within ``value = tensor[rows]``."""
    stored = slice(rows.start, min(rows.stop, item.stored.shape[0]))
    if stored.stop <= stored.start:
        return
    region = (stored, *(slice(0, n) for n in item.tensor.shape[1:]))
    for number, sha256 in hash_units(digest, region, value[: stored.stop - stored.start]):
        digest.put(number, sha256)


def _slabs_of(item: Located, own: slice) -> Iterator[slice]:
    """The ranges in which a rank reads its experts; one that is empty if it has none."""
    if own.start == own.stop:
        yield own
        return
    step = next(slabs(item, SLAB)).stop
    for at in range(own.start, own.stop, step):
        yield slice(at, min(at + step, own.stop))


def _hashed_by(items: Sequence[Located], base: ShardedBase) -> dict[str, int]:
    """The rank that hashes each sharded tensor that has one digest."""
    return appointed(
        [
            (item.tensor.name, _nbytes(item))
            for item in items
            if _one_digest(item) and base.rows(item.tensor.name) is not None
        ],
        base.world.size,
    )


def _one_digest(item: Located) -> bool:
    """Whether a tensor is hashed whole; a stack of experts is hashed slice by slice."""
    return item.tensor.row.kind is not Kind.EXPERTS


def _nbytes(item: Located) -> int:
    return sum(place.header.end - place.header.start for place in item.places)
