"""Records of a source, from the files that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..api.media import RowError
from .jsonl import MAX_LINE, Hasher, lines, parse
from .source import Record

if TYPE_CHECKING:
    from .source import Source


def records(source: Source, digest: Hasher | None = None) -> Iterator[Record]:
    """Yield the records of a source, in order.

    Args:
        source: the source.
        digest: updated with every byte of its files.

    Raises:
        InputError: ``QC-DATA-001`` cannot be read, ``QC-DATA-003`` another format.
    """
    for path in source.files:
        for number, raw in lines(path, digest):
            try:
                if raw is None:
                    raise RowError(
                        "QC-DATA-004", "is too long", expected=f"at most {MAX_LINE} bytes"
                    )
                yield Record(source, path, number, parse(raw))
            except RowError as bad:
                yield Record(source, path, number, bad)
