"""Reads the rows of sources: a record is converted to the canonical form, repaired and checked.

This file decides the order of these steps and the numbers of rows: from 1 over all sources, with
refused rows counted. `qcore.data.sources.containers` reads records, `qcore.data.formats` converts
them, `qcore.data.repairs.repair` repairs rows, `qcore.data.rows` checks them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..api.media import RowError
from ..errors import InputError
from .findings import Findings
from .formats import Formats
from .rejects import RecordPlace
from .repairs.notes import RepairContext
from .repairs.repair import repair
from .rows import ChatRow, RowCheck
from .source_counts import SourceCount
from .sources.containers import records

if TYPE_CHECKING:
    from .rejects import Rejects
    from .sources.jsonl import Hasher
    from .sources.source import Record, Source


_REPORTED = 1 << 18  #: bytes between two reports of progress


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReader:
    """Makes a checked row of a record.

    Attributes:
        formats: the row formats that are installed.
        check: the rules of one chat format.
        context: what repairs know of the run.
        findings: receives what was repaired.
    """

    formats: Formats
    check: RowCheck
    context: RepairContext
    findings: Findings

    def __call__(self, record: Record, number: int) -> tuple[str, ChatRow]:
        """The name of the record's format, and the row.

        Raises:
            RowError: the row is refused.
            UsageError: as `Formats.convert`.
            PluginError: as `Formats.convert`.
        """
        if isinstance(record.value, RowError):
            raise record.value
        source = record.source
        name, canonical = self.formats.convert(
            record.value,
            forced=source.format,
            fields=source.fields,
            ignore=source.ignore_columns,
        )
        repaired, notes = repair(canonical, self.context, number=number, raw=record.value)
        row = self.check(record.line, repaired)
        self.findings.extend(notes)
        return name, row


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
    reader: Callable[[Record, int], tuple[str, ChatRow]],
    rejects: Rejects,
    counts: list[SourceCount] | None = None,
    *,
    first: int = 1,
    seed: int = 0,
    only: Collection[int] = (),
    advance: Callable[[int], None] | None = None,
) -> Iterator[ChatRow]:
    """Yield the valid rows of some sources, in one pass and constant memory.

    Args:
        sources: where the rows come from, in order.
        reader: makes a row of a record and its number; a `RowReader`.
        rejects: collects bad rows.
        counts: receives what came from each source.
        first: number of the first row.
        seed: chooses the rows of a source with a weight or count and no seed of its own.
        only: numbers of rows; the others are passed over unchecked. Empty: all rows.
        advance: called with the number of bytes read since the last call.

    Raises:
        InputError: as `records`; ``QC-DATA-002`` a source has no rows.
    """
    number = first - 1
    for source in sources:
        count = SourceCount(source, first=number + 1)
        if counts is not None:
            counts.append(count)
        digest = hashlib.sha256()
        seen = digest if advance is None else _Counted(digest, advance)
        for record in records(source, seen, seed=seed):
            number += 1
            count.rows += 1
            if only and number not in only:
                continue
            try:
                name, row = reader(record, number)
            except RowError as bad:
                place = RecordPlace(number, record.line, record.path, source, record.unit)
                rejects.add(place, bad)
            else:
                count.formats[name] += 1
                yield replace(
                    row, row=number, path=record.path, unit=record.unit, source=source, format=name
                )
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
