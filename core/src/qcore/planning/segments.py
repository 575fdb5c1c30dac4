"""Memory and work of a segment of a step, and their extrapolation to longer packs.

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

#: Tokens of the longest row of the packs that a longer one is told from.
SAMPLES = (2048, 4096, 8192)


class Work(NamedTuple):
    """One op: what it is, its matrix products' operations, bytes read and written.

    Attributes:
        name: the op's or kernel's.
        flops: operations of products.
        nbytes: of all tensors that it was given or made.
        wide: whether its products are of float32.
    """

    name: str
    flops: float
    nbytes: int
    wide: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Bytes over what lay there before, the input included, and the work.

    Attributes:
        kept: after the forward; the input is given up where nobody saved it.
        forward: the most during the forward.
        backward: the most during the backward.
        forward_work: what the forward does.
        backward_work: what the backward does.
        forward_by_op: what of `forward` is whose, by op.
        backward_by_op: the same of `backward`.
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
        """Forwards and backwards."""
        return len(self.forward_work) + len(self.backward_work)


def smaller(lengths: Lengths) -> tuple[Lengths, ...]:
    """Packs of as many rows, every row shorter in the same proportion; none for a short pack."""
    longest = max(lengths)
    if longest < SAMPLES[-1] + TILE:  # as long as the longest that others are told from
        return ()
    return tuple(tuple(_shorter(one, size / longest) for one in lengths) for size in SAMPLES)


def _shorter(length: int, share: float) -> int:
    # What is left over by a tile stays, so that last tiles are as full as they were.
    tiles = round(length // TILE * share)
    return min(length, TILE * tiles + length % TILE or TILE)


def grows(segments: Sequence[Segment]) -> bool:
    """Whether launches grow with the tokens; of a fused op they are the same, or nearly."""
    return segments[1].launches > 1.25 * segments[0].launches


def affine(tokens: Sequence[int], values: Sequence[int], to: int) -> int:
    """The line through the last two, at `to`; no less than the last."""
    (x, at), (y, end) = list(zip(values, tokens, strict=True))[-2:]
    return max(y, round(y + (y - x) * (to - end) / (end - at)))


def extrapolated(tokens: Sequence[int], segments: Sequence[Segment], to: int) -> Segment:
    """The segment of a pack of `to` tokens, of the shape of three with fewer.

    Args:
        tokens: of the three, ascending.
        segments: theirs.
        to: more than the last of them.
    """

    def by_op(each: Sequence[Mapping[str, int]]) -> dict[str, int]:
        return {op: affine(tokens, [one.get(op, 0) for one in each], to) for op in each[-1]}

    return Segment(
        kept=affine(tokens, [one.kept for one in segments], to),
        forward=affine(tokens, [one.forward for one in segments], to),
        backward=affine(tokens, [one.backward for one in segments], to),
        forward_work=_more_work(tokens, [one.forward_work for one in segments], to),
        backward_work=_more_work(tokens, [one.backward_work for one in segments], to),
        forward_by_op=by_op([one.forward_by_op for one in segments]),
        backward_by_op=by_op([one.backward_by_op for one in segments]),
    )


def _more_work(
    tokens: Sequence[int], works: Sequence[tuple[Work, ...]], to: int
) -> tuple[Work, ...]:
    """The ops of each name, as many as there will be, each of the mean size."""
    more: list[Work] = []
    for name, wide in dict.fromkeys((one.name, one.wide) for one in works[-1]):
        each = [[one for one in work if (one.name, one.wide) == (name, wide)] for work in works]
        count = affine(tokens, [len(ops) for ops in each], to)
        flops = _quadratic(tokens, [sum(one.flops for one in ops) for ops in each], to)
        nbytes = affine(tokens, [sum(one.nbytes for one in ops) for ops in each], to)
        more += [Work(name, flops / count, nbytes // count, wide)] * count
    return tuple(more)


def _quadratic(tokens: Sequence[int], values: Sequence[float], to: int) -> float:
    """Lagrange's parabola through three points, at `to`; no less than the last."""
    total = 0.0
    for number, value in enumerate(values):
        share = 1.0
        for other, at in enumerate(tokens):
            if other != number:
                share *= (to - at) / (tokens[number] - at)
        total += value * share
    return max(values[-1], total)
