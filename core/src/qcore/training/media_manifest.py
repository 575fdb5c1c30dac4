"""Which media a run was started on, so that a resumed run can name the one that changed.

This file decides what ``OUTPUT.run/media.txt`` holds: a line for each medium of the data file, in
its order: the row's line, which of the row's media, and half of its digest. It is no part of a
run's identity, which has one digest of all (`resume`), and a run without it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from ..data.dataset import Dataset
from ..io.atomic import reading, rewrite

LIST = "media.txt"


def note_media(folder: Path, rows: Dataset, *, resume: bool) -> None:
    """Write the list, of rows that have any; a run that goes on has it.

    Raises:
        WriteError: ``QC-WRITE-003`` to ``-006``.
    """
    if rows.kinds and not (resume and (folder / LIST).exists()):
        rewrite(folder / LIST, (f"{line}\n".encode() for line in _lines(rows)))


def first_changed(folder: Path, rows: Dataset) -> str | None:
    """The first medium that is another than when the run started; ``None``: not known.

    Raises:
        InputError: ``QC-READ-001``.
    """
    path = folder / LIST
    if not path.exists():
        return None
    with reading(path), path.open(encoding="utf-8", errors="replace") as file:
        for was, now in zip_longest((line.rstrip("\n") for line in file), _lines(rows)):
            if was != now:
                line, _, rest = (now or was or "").partition(" ")
                return f"line {line}, medium {rest.partition(' ')[0]}"
    return None


def _lines(rows: Dataset) -> Iterator[str]:
    for row in sorted((*rows.train, *rows.eval), key=lambda one: one.line):
        for number, medium in enumerate(row.media, 1):
            yield f"{row.line} {number} {medium.digest[:32]}"
