"""Digests of a run's images and videos, by which a resumed run names the one that changed.

This file decides what ``OUTPUT.run/media.txt`` holds: for each medium, in the order of the rows,
the number of its row, its number within the row, and half of its digest. The identity of a run
(`resume`) holds one digest of all media and not this list; a run can be resumed without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from ..data.dataset import Dataset
from ..io.atomic import reading, rewrite

LIST = "media.txt"


def note_media(folder: Path, rows: Dataset, *, resume: bool) -> None:
    """Write the list if rows have media; a resumed run keeps the list that is there.

    Raises:
        WriteError: ``QC-WRITE-003`` to ``-006``.
    """
    if rows.kinds and not (resume and (folder / LIST).exists()):
        rewrite(folder / LIST, (f"{line}\n".encode() for line in _lines(rows)))


def first_changed(folder: Path, rows: Dataset) -> str | None:
    """The first medium that differs from the start of the run; ``None``: not known.

    Raises:
        InputError: ``QC-READ-001``.
    """
    path = folder / LIST
    if not path.exists():
        return None
    with reading(path), path.open(encoding="utf-8", errors="replace") as file:
        for was, now in zip_longest((line.rstrip("\n") for line in file), _lines(rows)):
            if was != now:
                row, _, rest = (now or was or "").partition(" ")
                return f"row {row}, medium {rest.partition(' ')[0]}"
    return None


def _lines(rows: Dataset) -> Iterator[str]:
    for row, media in rows.rows_with_media():
        for number, medium in enumerate(media, 1):
            yield f"{row} {number} {medium.digest[:32]}"
