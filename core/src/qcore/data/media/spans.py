"""Positions of media in a row: excluded from the trained text, and located among the tokens.

This file decides that placeholders of media are never trained, and checks the positions that a
reader returns before a model uses them. `qcore.data.rendering.masking` decides what else is
trained; the reader decides which placeholders it writes.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...api.media import RowError

if TYPE_CHECKING:
    from ...api.media import MediaReader, Medium, Placed


def less_media(
    trained: Sequence[tuple[int, int]],
    rendered: str,
    inside: Sequence[tuple[int, int]],
    media: Sequence[Medium],
    reader: MediaReader,
) -> list[tuple[int, int]]:
    """Remove from the trained ranges of an expanded text what the reader inserted.

    A reader may insert plain text too, such as a timestamp, which has no control token.

    Args:
        trained: ranges in the expanded text.
        rendered: the text before the expansion.
        inside: the same ranges in `rendered`.
        media: media of the row, in order.
        reader: the reader that expanded it.
    """
    control = re.compile(f"(?:{'|'.join(map(re.escape, reader.control))})+")
    if not any(control.search(rendered, start, end) for start, end in inside):
        return list(trained)  # the usual case: assistant turns contain no media
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
    """Locate what the reader inserted, by expanding one prefix after another."""
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
    """Locate a row's media among its tokens; every tower output needs its own control token.

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
            "has the wrong number of placeholder tokens for its media",
            found=f"{len(placed.where)} of {len(ids)} tokens",
            expected=f"{wanted}, and a position for every token",
            fix="use the tokenizer.json that came with the weights",
        )
    return placed
