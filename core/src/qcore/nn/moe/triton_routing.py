"""Triton backend of `Routing.of`: a stable counting sort of rows by expert, in four launches.

This file decides that the order is that of a stable sort and the same in every run: no atomics.
A block of flat places is counted; an expert's counts are summed over blocks; ends and tiles
follow; then each place finds its row by those before it. Needs Triton at import.

Shapes: R flat places (token, choice), E experts, B blocks of places.
"""

# Triton kernels have no types that mypy knows.
# mypy: ignore-errors

from __future__ import annotations

import torch
from torch import Tensor

from ...api.records import Verdict
from ..kernels.language import tl, triton
from ..kernels.launch import cdiv, launch, next_power_of_2
from .routing import Routing
from .triton import tile_count, tile_rows

_PLACES = 256  # of a block


@triton.jit
def _count(chosen, counts, R, B, E, BE: tl.constexpr, BP: tl.constexpr):
    """Places of each expert in a block: ``[E, B]``."""
    place = tl.program_id(0) * BP + tl.arange(0, BP)
    here = place < R
    expert = tl.load(chosen + place, mask=here, other=0).to(tl.int32)
    many = tl.histogram(expert, BE, mask=here)
    e = tl.arange(0, BE)
    tl.store(counts + e.to(tl.int64) * B + tl.program_id(0), many, mask=e < E)


@triton.jit
def _before(counts, totals, B, BB: tl.constexpr):
    """An expert's places in earlier blocks, in place; and in all."""
    e = tl.program_id(0).to(tl.int64)
    carry = tl.zeros((), dtype=tl.int32)
    for first in range(0, B, BB):
        block = first + tl.arange(0, BB)
        many = tl.load(counts + e * B + block, mask=block < B, other=0)
        tl.store(counts + e * B + block, carry + tl.cumsum(many, 0) - many, mask=block < B)
        carry += tl.sum(many, 0)
    tl.store(totals + e, carry.to(tl.int64))


@triton.jit
def _ends(totals, ends, tiles, count, E, BM: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr):
    """Where experts end, and each tile's expert and first row; every program scans the totals."""
    e = tl.arange(0, BE)
    rows = tl.load(totals + e, mask=e < E, other=0).to(tl.int32)
    end = tl.cumsum(rows, 0)
    if tl.program_id(0) == 0:
        tl.store(ends + e, end, mask=e < E)
    many = (rows + BM - 1) // BM
    last = tl.cumsum(many, 0)
    tile = tl.program_id(0) * BT + tl.arange(0, BT)
    expert = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), 1)
    mine = e[None, :] == expert[:, None]
    first = tl.sum(tl.where(mine, (end - rows - (last - many) * BM)[None, :], 0), 1) + tile * BM
    real = tile < tl.sum(many, 0)
    tl.store(tiles + 2 * tile, tl.where(real, expert, -1), mask=tile < count)
    tl.store(tiles + 2 * tile + 1, tl.where(real, first, 0), mask=tile < count)


@triton.jit
def _place(chosen, before, ends, order, inverse, R, B, BP: tl.constexpr, BJ: tl.constexpr):
    """The row of each place: its expert's start, earlier blocks, earlier places of this one."""
    first = tl.program_id(0) * BP
    place = first + tl.arange(0, BP)
    here = place < R
    expert = tl.load(chosen + place, mask=here, other=-1).to(tl.int32)
    row = tl.load(ends + expert - 1, mask=here & (expert > 0), other=0)
    row += tl.load(before + expert * B + tl.program_id(0), mask=here, other=0)
    for j in range(0, BP, BJ):
        other = first + j + tl.arange(0, BJ)
        theirs = tl.load(chosen + other, mask=other < R, other=-2).to(tl.int32)
        same = (theirs[None, :] == expert[:, None]) & (other[None, :] < place[:, None])
        row += tl.sum(same.to(tl.int32), 1)
    tl.store(inverse + place, row.to(tl.int64), mask=here)
    tl.store(order + row, place.to(tl.int64), mask=here)


def routing_of(chosen: Tensor, experts: int) -> Routing:
    """`Routing.of`, with its tiles and counts: ``[T, k]`` int64 -> where rows go."""
    chosen = chosen.contiguous()
    rows = chosen.numel()
    blocks = cdiv(rows, _PLACES)
    wide = max(16, next_power_of_2(experts))

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=chosen.device)

    counts, totals = new(experts, blocks), new(experts, dtype=torch.int64)
    ends, tiles = new(experts), new(tile_count(rows, experts), 2)
    order, inverse = new(rows, dtype=torch.int64), new(rows, dtype=torch.int64)
    launch(_count, (blocks,), chosen, counts, rows, blocks, experts, BE=wide, BP=_PLACES)
    launch(_before, (experts,), counts, totals, blocks, BB=1024)
    launch(
        _ends, (cdiv(len(tiles), 64),), totals, ends, tiles, len(tiles), experts,
        BM=tile_rows(rows, experts), BE=wide, BT=64,
    )  # fmt: skip
    launch(_place, (blocks,), chosen, counts, ends, order, inverse, rows, blocks, BP=_PLACES, BJ=32)
    return Routing(order, inverse, ends, chosen.shape[1], tiles, totals)


def verify(device: torch.device) -> Verdict:
    """Equality with the reference: many and few tokens, odd counts, experts without a row."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0.0
    for tokens, experts, k in ((1, 256, 8), (517, 256, 8), (3000, 60, 4), (33, 7, 1)):
        scores = torch.rand(tokens, experts, generator=generator)
        scores += torch.rand(experts, generator=generator)
        chosen = scores.topk(k, 1).indices.to(device)
        got, expected = routing_of(chosen, experts), Routing.of(chosen, experts)
        for name in ("order", "inverse", "ends", "counts"):
            if not torch.equal(getattr(got, name), getattr(expected, name)):
                wrong = float("inf")
    return Verdict(output=wrong, output_bound=0.0)
