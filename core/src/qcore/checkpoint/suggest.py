"""Hints for a mistyped folder or hub id: the id in a URL, or the nearest local folder."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from ..errors import nearest


def suggest_folder(source: str, path: Path) -> str | None:
    """Return a hint for a mistyped folder or hub id: the id in a URL, or the nearest local folder.

    Args:
        source: the value that the user passed.
        path: the same as a path, with ``~`` expanded.

    Returns:
        ``did you mean NAME?``, or ``None`` if nothing is similar.
    """
    if "://" in source:
        tail = source.partition("://")[2].split("/")[1:3]
        return f"did you mean {'/'.join(tail)}?" if len(tail) == 2 else None
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in islice(entries, 10_000) if entry.is_dir()]
    except OSError:
        return None
    name = nearest(missing.name, names)
    if name is None:
        return None
    guess = missing.with_name(name)
    rest = path.relative_to(missing)
    return f"did you mean {guess / rest if (guess / rest).is_dir() else guess}?"
