"""`Segment`: bytes and ops of a layer or the loss, and their extrapolation to longer packs.

This file decides how a long pack is extrapolated from smaller packs of its shape: bytes are affine
in the tokens, FLOPs of matrix products quadratic, because of attention. It is used for backends
that loop over the tokens on the host, as references do, where measuring takes time proportional to
the pack. Quantities with a bound that the smaller packs do not reach are overestimated. It imports
no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..data.microbatches import TILE
from .report import Lengths

#: Tokens of the longest row in the packs that longer packs are extrapolated from.
SAMPLES = (2048, 4096, 8192)


class Work(NamedTuple):
    """The work of one op or kernel.

    Attributes:
        name: name of the op or kernel.
        flops: floating-point operations of its matrix products.
        nbytes: bytes of all tensors that it reads or writes.
        wide: whether its products are in float32.
    """

    name: str
    flops: float
    nbytes: int
    wide: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Memory in bytes and work of a segment; memory allocated before its input is not counted.

    Attributes:
        kept: bytes after the forward; the input is included if the segment saves it.
        forward: peak bytes during the forward, the input included.
        backward: peak bytes during the backward, the input included.
        forward_work: ops of the forward.
        backward_work: ops of the backward.
        forward_by_op: bytes of `forward` by the op that allocated them.
        backward_by_op: bytes of `backward` by the op that allocated them.
    """

    kept: int
    forward: int
    backward: int
    forward_work: tuple[Work, ...]
    backward_work: tuple[Work, ...]
    forward_by_op: Mapping[str, int] = field(default_factory=dict)
    backward_by_op: Mapping[str, int] = field(default_factory=dict)

    @property
    def launches(self) -> int:
        """Number of ops in forward and backward."""
        return len(self.forward_work) + len(self.backward_work)


def smaller(lengths: Lengths) -> tuple[Lengths, ...]:
    """Return packs with the same number of rows, all shortened alike; none for a short pack."""
    longest = max(lengths)
    if longest < SAMPLES[-1] + TILE:  # no longer than the largest sample
        return ()
    return tuple(tuple(_shorter(length, size / longest) for length in lengths) for size in SAMPLES)


def _shorter(length: int, ratio: float) -> int:
    # The remainder of a tile stays, so that the last tile is as full as in the long pack.
    tiles = round(length // TILE * ratio)
    return min(length, TILE * tiles + length % TILE or TILE)


def grows(segments: Sequence[Segment]) -> bool:
    """Whether launches grow with the tokens, as in an op that loops; fused ops launch as many."""
    return segments[1].launches > 1.25 * segments[0].launches


def affine(tokens: Sequence[int], values: Sequence[int], to: int) -> int:
    """Extrapolate linearly through the last two points; the result is at least the last value.

    Args:
        tokens: tokens of each point, ascending.
        values: value at each point.
        to: tokens to extrapolate to.
    """
    (x, at), (y, end) = list(zip(values, tokens, strict=True))[-2:]
    return max(y, round(y + (y - x) * (to - end) / (end - at)))


def extrapolated(tokens: Sequence[int], segments: Sequence[Segment], to: int) -> Segment:
    """Extrapolate a segment from the segments of three smaller packs of the same shape.

    Args:
        tokens: tokens of the smaller packs, ascending.
        segments: segments of the smaller packs.
        to: tokens of the large pack.
    """

    def by_op(each: Sequence[Mapping[str, int]]) -> dict[str, int]:
        return {op: affine(tokens, [sizes.get(op, 0) for sizes in each], to) for op in each[-1]}

    return Segment(
        kept=affine(tokens, [segment.kept for segment in segments], to),
        forward=affine(tokens, [segment.forward for segment in segments], to),
        backward=affine(tokens, [segment.backward for segment in segments], to),
        forward_work=_more_work(tokens, [segment.forward_work for segment in segments], to),
        backward_work=_more_work(tokens, [segment.backward_work for segment in segments], to),
        forward_by_op=by_op([segment.forward_by_op for segment in segments]),
        backward_by_op=by_op([segment.backward_by_op for segment in segments]),
    )


def _more_work(
    tokens: Sequence[int], works: Sequence[tuple[Work, ...]], to: int
) -> tuple[Work, ...]:
    """Extrapolate the count and total size of ops by name; each op gets the mean size."""
    more: list[Work] = []
    for name, wide in dict.fromkeys((op.name, op.wide) for op in works[-1]):
        each = [[op for op in work if (op.name, op.wide) == (name, wide)] for work in works]
        count = affine(tokens, [len(ops) for ops in each], to)
        flops = _quadratic(tokens, [sum(op.flops for op in ops) for ops in each], to)
        nbytes = affine(tokens, [sum(op.nbytes for op in ops) for ops in each], to)
        more += [Work(name, flops / count, nbytes // count, wide)] * count
    return tuple(more)


def _quadratic(tokens: Sequence[int], values: Sequence[float], to: int) -> float:
    """Extrapolate with the parabola through three points; at least the last value."""
    total = 0.0
    for number, value in enumerate(values):
        share = 1.0
        for other, at in enumerate(tokens):
            if other != number:
                share *= (to - at) / (tokens[number] - at)
        total += value * share
    return max(values[-1], total)
