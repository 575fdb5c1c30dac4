"""Sources of the words after ``--data``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .source import Source


def read_sources(
    data: Sequence[str | Path],
    *,
    format: str = "",
    media_root: Path | None = None,
    command: str = "--data",
) -> tuple[Source, ...]:
    """A source for each word.

    Args:
        data: files.
        format: forced row format.
        media_root: folder below which absolute media paths may lie.
        command: the option, for errors.
    """
    return tuple(
        Source(name=str(word), files=(Path(word),), format=format, media_root=media_root)
        for word in data
    )
