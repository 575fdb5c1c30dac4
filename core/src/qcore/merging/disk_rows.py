"""Reads single rows of tensors on disk in float32, and checks rounding, to verify a merge.

This file also decides what stands in for a weight that qcore does not decode: random values, the
same at each call. Base, base + adapter and merge have them in common, so that a layer with the
changed weights is still compared with what training computes; a merge copies the weight itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ..api.parameters import Region
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import Located
from ..nn.load import DTYPES, as_bytes, read_exact, read_tensor

_BLOCK = 8192  # rows that are in memory at a time


def rows_of(item: Located, rows: slice) -> Region:
    """The region ``tensor[rows]`` of a tensor."""
    return (rows, *(slice(0, n) for n in item.tensor.shape[1:]))


def is_rounded(value: Tensor, exact: Tensor) -> bool:
    """Whether `value` is the float32 tensor `exact`, rounded once to the dtype of `value`."""
    if value.dtype != torch.float64:
        return torch.equal(value, exact.to(value.dtype))
    # The merge rounded a float64 sum, `exact` is float32.
    return torch.allclose(value.float(), exact, rtol=1e-6, atol=1e-9)


def read_or_stand_in(checkpoint: Checkpoint, item: Located, rows: slice | None = None) -> Tensor:
    """`read_tensor`, or values of about the size that weights have if the weight is packed."""
    if item.packed is None:
        return read_tensor(checkpoint, item, rows)
    name, shape = item.tensor.name, item.tensor.shape
    rows = rows or slice(0, shape[0])
    digest = hashlib.sha256(f"{name} {rows.start}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.randn(rows.stop - rows.start, *shape[1:], generator=generator)
    return values.div_(math.sqrt(shape[-1])).bfloat16()


def gather(checkpoint: Checkpoint, item: Located, rows: list[int]) -> Tensor:
    """Some rows of a matrix on disk, float32, without reading the rest."""
    if len(item.places) != 1 or item.packed or item.four_bit or item.places[0].scale is not None:
        return read_or_stand_in(checkpoint, item)[rows].float()
    header = item.places[0].header
    picked = torch.empty(len(rows), header.shape[1], dtype=DTYPES[header.dtype])
    stride = picked.stride(0) * picked.element_size()
    with checkpoint.file(header.file).open("rb") as file:
        for slot, row in enumerate(rows):
            if row >= header.shape[0]:  # the run adds it
                picked[slot] = 0
                continue
            file.seek(header.start + row * stride)
            read_exact(file, as_bytes(picked[slot]), header)
    return picked.float()


def row_slices(item: Located) -> Iterator[slice]:
    """The ranges of rows in which `blocks` reads a matrix; none cuts rows that share FP8 scales."""
    edges, step = {0, item.tensor.shape[0]}, _BLOCK
    for place in item.places:
        if place.block is not None:
            edges |= {place.region[0].start, place.region[0].stop}
            step = max(_BLOCK // place.block[0], 1) * place.block[0]
    for first, last in pairwise(sorted(edges)):
        for at in range(first, last, step):
            yield slice(at, min(at + step, last))


def blocks(checkpoint: Checkpoint, item: Located) -> Iterator[Tensor]:
    """A matrix on disk, a block of rows at a time, float32."""
    for rows in row_slices(item):
        yield read_or_stand_in(checkpoint, item, rows).float()
