"""Reading the rows of sources: records become canonical rows, and those become checked rows.

This file decides the order of these steps and the numbers of rows: from 1 over all sources, with
refused rows counted. `qcore.data.containers` reads records, `qcore.data.rows` checks rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..api.media import RowError
from ..errors import InputError
from .containers import records
from .rows import ChatRow, RowCheck

if TYPE_CHECKING:
    from .jsonl import Hasher
    from .rejects import Rejects
    from .source import Record, Source


_REPORTED = 1 << 18  #: bytes between two reports of progress


@dataclass(slots=True)
class SourceCount:
    """What came from one source; complete once its rows are read.

    Attributes:
        source: the source.
        sha256: hex digest of its files.
        rows: its rows, refused ones included.
        refused: rows that are refused.
        formats: rows by row format.
    """

    source: Source
    sha256: str = ""
    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, object]:
        """For a manifest."""
        source = self.source
        return {
            "name": source.name,
            **({"revision": source.revision} if source.revision else {}),
            "files": [path.name for path in source.files],
            "sha256": self.sha256,
            "rows": self.rows,
            "formats": dict(sorted(self.formats.items())),
        }


@dataclass(frozen=True, slots=True)
class _Place:
    row: int
    line: int
    path: Path | None
    source: Source | None


@dataclass(slots=True)
class _Counted:
    """A hash that reports how many bytes it has seen."""

    digest: Hasher
    advance: Callable[[int], None]
    pending: int = 0

    def update(self, data: bytes, /) -> None:
        self.digest.update(data)
        self.pending += len(data)
        if self.pending > _REPORTED:
            self.report()

    def report(self) -> None:
        """Report the bytes since the last report."""
        self.advance(self.pending)
        self.pending = 0


def read_rows(
    sources: Sequence[Source],
    check: RowCheck,
    rejects: Rejects,
    counts: list[SourceCount] | None = None,
    *,
    first: int = 1,
    only: Collection[int] = (),
    advance: Callable[[int], None] | None = None,
) -> Iterator[ChatRow]:
    """Yield the valid rows of some sources, in one pass and constant memory.

    Args:
        sources: where the rows come from, in order.
        check: the rules of one chat format.
        rejects: collects bad rows.
        counts: receives what came from each source.
        first: number of the first row.
        only: numbers of rows; the others are passed over unchecked. Empty: all rows.
        advance: called with the number of bytes read since the last call.

    Raises:
        InputError: as `records`; ``QC-DATA-002`` a source has no rows.
    """
    number = first - 1
    for source in sources:
        count = SourceCount(source)
        if counts is not None:
            counts.append(count)
        digest = hashlib.sha256()
        seen = digest if advance is None else _Counted(digest, advance)
        for record in records(source, seen):
            number += 1
            count.rows += 1
            if only and number not in only:
                continue
            try:
                row = _row(record, check, count)
            except RowError as bad:
                rejects.add(_Place(number, record.line, record.path, source), bad)
            else:
                yield replace(row, row=number, path=record.path, source=source)
        if isinstance(seen, _Counted):
            seen.report()
        count.sha256 = digest.hexdigest()
        if not count.rows:
            raise InputError(
                "QC-DATA-002",
                "has no rows",
                file=source.files[0] if len(source.files) == 1 else source.name,
                expected='one {"messages": [...]} a line',
                fix="name the file that holds the conversations",
            )


def _row(record: Record, check: RowCheck, count: SourceCount) -> ChatRow:
    if isinstance(record.value, RowError):
        raise record.value
    row = check(record.line, record.value)
    count.formats[row.format] += 1
    return row
