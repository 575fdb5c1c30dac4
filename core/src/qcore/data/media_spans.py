"""Where a row's media lie: among the characters that are trained, and among the tokens.

This file decides that nothing which stands for media is trained, and proves a reader's places
before a model sees them. Which text is trained otherwise is `qcore.data.masking`'s business; what
stands for a medium is its reader's.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..api.media import RowError

if TYPE_CHECKING:
    from ..api.media import MediaReader, Medium, Placed


def less_media(
    trained: Sequence[tuple[int, int]],
    rendered: str,
    inside: Sequence[tuple[int, int]],
    media: Sequence[Medium],
    reader: MediaReader,
) -> list[tuple[int, int]]:
    """Trained ranges of an expanded text, less what its reader wrote there.

    A reader may write plain text too, such as the time of a part of a medium, and no token of
    that is a control token.

    Args:
        trained: ranges of the expanded text.
        rendered: the text before it was expanded.
        inside: the same ranges in `rendered`.
        media: of the row, in order.
        reader: which expanded it.
    """
    control = re.compile(f"(?:{'|'.join(map(re.escape, reader.control))})+")
    if not any(control.search(rendered, start, end) for start, end in inside):
        return list(trained)  # as nearly every row: a model does not write media
    left: list[tuple[int, int]] = []
    written = list(_written(rendered, control, media, reader))
    for start, end in trained:
        for first, last in written:
            if start <= first and last <= end:
                left.append((start, first))
                start = last
        left.append((start, end))
    return [(start, end) for start, end in left if start < end]


def _written(
    rendered: str, control: re.Pattern[str], media: Sequence[Medium], reader: MediaReader
) -> Iterator[tuple[int, int]]:
    """Ranges of the expanded text that its reader wrote, by expanding one prefix after another."""
    count = grown = 0
    for run in control.finditer(rendered):
        while True:
            try:
                prefix = reader.expand(rendered[: run.end()], media[:count])
                break
            except RowError:
                if count == len(media):
                    raise
                count += 1
        yield run.start() + grown, len(prefix)
        grown = len(prefix) - run.end()


def place(
    reader: MediaReader, media: Sequence[Medium], ids: array[int], control: frozenset[int | None]
) -> Placed:
    """Where a row's media lie, proved: every output of the tower has its own control token.

    Raises:
        RowError: ``QC-MASK-004``.
    """
    placed = reader.place(ids, media)
    wanted = sum(medium.tokens for medium in media)
    where = set(placed.where)
    if (
        not len(placed.where) == len(where) == wanted
        or any(not 0 <= at < len(ids) or ids[at] not in control for at in where)
        or any(len(axis) != len(ids) for axis in placed.positions)
    ):
        raise RowError(
            "QC-MASK-004",
            "has other tokens for its media than they need",
            found=f"{len(placed.where)} of {len(ids)} tokens",
            expected=f"{wanted}, and a position for every token",
            fix="use the tokenizer.json that came with the weights",
        )
    return placed
