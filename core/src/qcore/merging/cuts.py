"""Cuts of the tensors of a base: what of a tensor is in memory at a time, and how it is read.

This file decides that a stack of experts is read a few experts at a time, any other tensor at once,
and that quantized values are decoded. `qcore.merging.rewrite` changes cuts and writes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from ..api.parameters import Region
from ..checkpoint.checkpoint import Header
from ..checkpoint.four_bit import FourBit
from ..checkpoint.layout import Layout
from ..errors import InputError
from ..nn.four_bit import read_four_bit
from ..nn.load import DTYPES, as_bytes, read_exact, read_fp8
from ..plugins.resolve_model import Identified
from .plan import TensorPatch

_COPY = 8 * 2**20  # bytes in flight when a tensor is only copied


class Cut(NamedTuple):
    """A part of a tensor on disk, and the canonical region that it holds.

    Attributes:
        name: of the tensor that is written.
        header: of the tensor that is read.
        scale: its block scales, where it is decoded from FP8.
        four_bit: its scales and state, where it is decoded from 4 bits.
        rows: of dim 0 of the tensor on disk; ``None`` for all of it, which may be one expert.
        each: bytes of one row.
        region: of the canonical tensor.
        added: whether it is rows that the base does not have.
    """

    name: str
    header: Header
    scale: Header | None
    rows: slice | None
    each: int
    region: Region
    four_bit: FourBit | None = None
    added: bool = False


def cuts_of(layout: Layout, patch: TensorPatch, size: int) -> list[Cut]:
    """A stack in cuts of some experts, any other tensor in one.

    Args:
    layout: of the base.
    patch: the tensor.
    size: bytes of a stack in one cut.
    """
    header, name = patch.source, patch.written.name
    every = tuple(slice(0, n) for n in patch.written.shape)
    _, region = layout.by_disk.get(name, (None, every))
    if patch.four_bit is not None:
        return [Cut(name, header, None, None, 0, region, patch.four_bit)]
    first, count = region[0].start, region[0].stop - region[0].start
    each = (header.end - header.start) // count
    step = max(1, size // each) if len(region) > 2 else count
    cuts = []
    for at in range(0, count, step):
        stop = min(at + step, count)
        rows = slice(at, stop) if header.shape[0] == count else None
        there = (slice(first + at, first + stop), *region[1:])
        cuts.append(Cut(name, header, patch.scale, rows, each, there))
    if patch.added:
        there = (slice(count, count + patch.added), *region[1:])
        cuts.append(Cut(name, header, None, None, each, there, added=True))
    return cuts


def read_cut(base: Identified, path: Path, cut: Cut) -> Tensor:
    """The values of a cut, in the shape of its region; quantized ones are decoded.

    Args:
    base: the base.
    path: its file with the tensor.
    cut: the cut.

    Raises:
    InputError: ``QC-LOAD-001`` a dtype that qcore does not read.
    """
    header, shape = cut.header, [part.stop - part.start for part in cut.region]
    if cut.four_bit is not None:
        return read_four_bit(base.checkpoint, cut.four_bit).view(shape)
    if cut.scale is not None:
        quantized = base.quantization
        assert quantized is not None
        assert quantized.block is not None
        where = base.checkpoint
        return read_fp8(where, header, cut.scale, quantized.block, cut.rows).view(shape)
    dtype = DTYPES.get(header.dtype)
    if dtype is None:
        raise InputError(
            "QC-LOAD-001",
            "is stored in a dtype that cannot be merged into",
            file=path,
            field=header.name,
            found=header.dtype,
            expected=", ".join(DTYPES),
            fix="merge into the bf16 revision of this checkpoint",
        )
    if cut.added:
        return torch.zeros(shape, dtype=dtype)
    weight = torch.empty(shape, dtype=dtype)
    with path.open("rb") as file:
        file.seek(header.start + (cut.rows.start * cut.each if cut.rows else 0))
        read_exact(file, as_bytes(weight), header)
    return weight


def stream(
    file: IO[bytes], header: Header, size: int, digest: hashlib._Hash | None
) -> Iterator[memoryview]:
    """The next `size` bytes of a tensor, a few at a time."""
    buffer = bytearray(min(_COPY, size))
    while size:
        view = memoryview(buffer)[: min(size, len(buffer))]
        read_exact(file, view, header)
        if digest is not None:
            digest.update(view)
        yield view
        size -= len(view)
