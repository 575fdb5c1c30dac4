"""Which micro-batches of a step run as one pack, and what a pack takes of kernels' tiles.

This file decides how short micro-batches are put together. Which rows a micro-batch has is
`schedule`'s, how much one pack may take `plan.run`'s. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

TILE = 64  #: tokens that a row's last tile may take of a kernel beyond its own


def extent(lengths: Sequence[int]) -> int:
    """Tokens of a pack and of the tiles that its rows begin and do not fill."""
    return sum(lengths) + TILE * len(lengths)


def joined(batches: list[list[int]], lengths: Sequence[int], most: int) -> list[list[int]]:
    """The micro-batches of a step, several as one wherever they are small.

    A step's loss is the mean over its supervised tokens however they are spread, so this changes
    no more than the order of sums; but what is drawn for each pack (dropout), or is each
    micro-batch's own (a load-balancing loss), is another. First fit, the longest first: at most
    11/9 of the fewest, and one more (Dosa 2007).

    Args:
        batches: rows of each micro-batch.
        lengths: tokens of each row of the data set.
        most: what one may take, as `extent` counts; a batch that takes more stays alone.
    """
    sizes = [extent([lengths[row] for row in rows]) for rows in batches]
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
