"""Joining of short micro-batches into packs, the size of a pack, and the share of each rank.

This file decides which micro-batches of a step run together, and which rank runs which. A media
unit counts like a token: that understates its cost, but a pack is bounded in both.
`qcore.data.sampler` decides the rows of a micro-batch, `qcore.planning.run` the size limit of a
pack. It imports no torch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from heapq import heapreplace
from typing import TYPE_CHECKING, Final

from .store.samples import Samples

if TYPE_CHECKING:
    from .rendering.masking import Example

TILE = 64  #: tokens of a kernel tile; the last tile of a row is padded to it
#: Tokens that a token attends to at about the cost of all its linear maps.
_SQUARE: Final = 1 << 16
_SLACK: Final = 0.03  #: share of the packs above the lower bound that is accepted
_STEPS: Final = 1024  #: parts of a pack in which sums of sizes are counted


def extent(lengths: Sequence[int], units: int = 0) -> int:
    """Size of a pack: its tokens, the padding of last tiles, and its media units."""
    return sum(lengths) + TILE * len(lengths) + units


def units_of_rows(rows: Iterable[Example]) -> Sequence[int]:
    """Media units of each row; empty if no row has media."""
    if isinstance(rows, Samples):
        return rows.units
    units = tuple(sum(medium.units for medium in row.media) for row in rows)
    return units if any(units) else ()


def cost(lengths: Sequence[int], units: int = 0) -> float:
    """Time of a micro-batch, in tokens: its extent, and attention, quadratic in each row."""
    return extent(lengths, units) + sum(length * length for length in lengths) / _SQUARE


def spread(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Spread micro-batches over ranks: the longest first, each to the rank with the least cost.

    Args:
        costs: of each micro-batch.
        ranks: number of ranks.

    Returns:
        For each rank the numbers of its micro-batches, ascending; none where there are fewer
        micro-batches than ranks.
    """
    shares = [list[int]() for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]  # a heap
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        load, rank = loads[0]
        heapreplace(loads, (load + costs[number], rank))
        shares[rank].append(number)
    return [sorted(share) for share in shares]


def joined(
    batches: list[list[int]], lengths: Sequence[int], most: int, units: Sequence[int] = ()
) -> list[list[int]]:
    """Join small micro-batches of a step.

    The loss of a step is the mean over its supervised tokens, so joining only changes the order of
    summation; random draws per pack (dropout) and losses per micro-batch (load balancing) change.

    Best-fit decreasing makes as few packs as possible unless few batches fit into one. Where it
    misses the lower bound by more than `_SLACK`, packs are filled one by one as far as possible,
    and the fewer packs are taken.

    Args:
        batches: rows of each micro-batch.
        lengths: tokens of each row of the data set.
        most: size limit of a pack, as `extent` counts; a larger batch stays alone.
        units: media units of each row of the data set; empty for text.
    """
    sizes = [
        extent([lengths[row] for row in rows], sum(units[row] for row in rows) if units else 0)
        for rows in batches
    ]
    order = sorted(range(len(batches)), key=lambda n: -sizes[n])
    alone = [[n] for n in order if sizes[n] > most]
    small = order[len(alone) :]
    packs = _best_fit(small, sizes, most)
    bound = -(-sum(sizes[n] for n in small) // most)
    if bound < (1 - _SLACK) * len(packs):
        packs = min(packs, _filled(small, sizes, most), key=len)
    return [[row for n in pack for row in batches[n]] for pack in (*alone, *packs)]


def _best_fit(order: Sequence[int], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Put each batch, the largest first, where it leaves the least room."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room and number of each pack, ascending
    for n in order:
        at = bisect_left(rooms, (sizes[n], -1))
        if at == len(rooms):
            rooms.append((most, len(packs)))
            packs.append([])
        room, pack = rooms.pop(at)
        packs[pack].append(n)
        insort(rooms, (room - sizes[n], pack))
    return packs


def _filled(order: Sequence[int], sizes: Sequence[int], most: int) -> list[list[int]]:
    """Fill one pack after another: with the largest batch left, and the best sum beside it.

    The sums are those of sizes rounded up to a `_STEPS`-th of a pack.
    """
    unit = -(-most // _STEPS)
    rounded = [-(-size // unit) for size in sizes]
    room, left, packs = most // unit, list(order), []
    while left:
        first, *rest = left
        chosen = _best_sum([rounded[n] for n in rest], room - rounded[first])
        packs.append([first, *(rest[at] for at in sorted(chosen))])
        left = [n for at, n in enumerate(rest) if at not in chosen]
    return packs


def _best_sum(values: Sequence[int], most: int) -> set[int]:
    """Indices of values whose sum is as large as possible, but at most `most`."""
    if most <= 0:
        return set()
    sums, below = [1], (1 << most + 1) - 1  # bit s is set where some of the values sum to s
    for value in values:
        sums.append((sums[-1] | sums[-1] << value) & below)
        if sums[-1] >> most:
            break
    total, chosen = sums[-1].bit_length() - 1, set()
    for at in range(len(sums) - 2, -1, -1):
        if not sums[at] >> total & 1:
            chosen.add(at)
            total -= values[at]
    return chosen
