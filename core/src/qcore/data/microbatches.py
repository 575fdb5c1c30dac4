"""Which micro-batches of a step run as one pack, and what a pack takes of kernels' tiles.

This file decides how short micro-batches are put together, and that a unit of media counts as
much as a token there: less than it takes, but a pack is bounded in both. Which rows a micro-batch
has is `schedule`'s, how much one pack may take `plan.run`'s. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .masking import Example

TILE = 64  #: tokens that a row's last tile may take of a kernel beyond its own


def extent(lengths: Sequence[int], units: int = 0) -> int:
    """Tokens of a pack and of the tiles that its rows begin and do not fill, and its units."""
    return sum(lengths) + TILE * len(lengths) + units


def units_of_rows(rows: Iterable[Example]) -> tuple[int, ...]:
    """Units of the media of each row; nothing where no row has any."""
    units = tuple(sum(medium.units for medium in row.media) for row in rows)
    return units if any(units) else ()


def joined(
    batches: list[list[int]], lengths: Sequence[int], most: int, units: Sequence[int] = ()
) -> list[list[int]]:
    """The micro-batches of a step, several as one wherever they are small.

    A step's loss is the mean over its supervised tokens however they are spread, so this changes
    no more than the order of sums; but what is drawn for each pack (dropout), or is each
    micro-batch's own (a load-balancing loss), is another. First fit, the longest first: at most
    11/9 of the fewest, and one more (Dosa 2007).

    Args:
        batches: rows of each micro-batch.
        lengths: tokens of each row of the data set.
        most: what one may take, as `extent` counts; a batch that takes more stays alone.
        units: of the media of each row of the data set; none: it is text alone.
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
