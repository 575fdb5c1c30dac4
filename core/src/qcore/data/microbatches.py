"""Joining of short micro-batches into packs, and the size of a pack in kernel tiles.

This file decides which micro-batches of a step run together. A media unit counts like a token:
that understates its cost, but a pack is bounded in both. `qcore.data.sampler` decides the rows of
a micro-batch, `qcore.planning.run` the size limit of a pack. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .store.samples import Samples

if TYPE_CHECKING:
    from .rendering.masking import Example

TILE = 64  #: tokens of a kernel tile; the last tile of a row is padded to it


def extent(lengths: Sequence[int], units: int = 0) -> int:
    """Size of a pack: its tokens, the padding of last tiles, and its media units."""
    return sum(lengths) + TILE * len(lengths) + units


def units_of_rows(rows: Iterable[Example]) -> Sequence[int]:
    """Media units of each row; empty if no row has media."""
    if isinstance(rows, Samples):
        return rows.units
    units = tuple(sum(medium.units for medium in row.media) for row in rows)
    return units if any(units) else ()


def joined(
    batches: list[list[int]], lengths: Sequence[int], most: int, units: Sequence[int] = ()
) -> list[list[int]]:
    """Join small micro-batches of a step.

    The loss of a step is the mean over its supervised tokens, so joining only changes the order of
    summation; random draws per pack (dropout) and losses per micro-batch (load balancing) change.
    First-fit decreasing: at most 11/9 of the optimal number plus one (Dosa 2007).

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
    found: list[list[int]] = []
    taken: list[int] = []
    for number in sorted(range(len(batches)), key=lambda n: -sizes[n]):
        size = sizes[number]
        place = next((n for n, used in enumerate(taken) if used + size <= most), None)
        if place is None:
            found.append([])
            taken.append(0)
            place = len(found) - 1
        found[place] += batches[number]
        taken[place] += size
    return found
