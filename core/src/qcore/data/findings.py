"""Findings on the rows of a run: what was repaired, dropped or left out, and what it means.

This file decides the record of one finding and how the findings of many rows are put together.
What is looked for is up to `qcore.data.repairs`, `qcore.data.samples` and the other readers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
KEPT = 1000  #: findings of one code that are kept; the others are counted
_SHOWN = 5  #: rows that a line of the report names


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFinding:
    """One observation on a row.

    Attributes:
        code: stable code, such as ``QC-DATA-043``.
        severity: ``error``, ``warning`` or ``note``.
        row: number of the row over all sources, from 1; 0 for a finding on all rows.
        field: where in the row: ``messages[1].content``.
        message: what is so.
        fix: what to do about it; empty where nothing needs to be done.
    """

    code: str
    severity: str
    row: int
    field: str
    message: str
    fix: str = ""

    def as_json(self) -> dict[str, Any]:
        """The entry of ``qcore data check --json``."""
        return {
            "code": self.code,
            "severity": self.severity,
            "row": self.row,
            "field": self.field,
            "message": self.message,
            "fix": self.fix,
        }


class Findings:
    """Collects the findings of a data set, in the order in which they are made.

    Findings of one code and severity are one line of the report: the number of rows, the message
    of the first one and the rows' numbers.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], list[DataFinding]] = {}
        self._count: dict[tuple[str, str], int] = {}
        self._rows: dict[tuple[str, str], int] = {}
        self._last: dict[tuple[str, str], int] = {}
        self._totals: dict[tuple[str, str], tuple[str, str]] = {}

    def add(self, finding: DataFinding) -> None:
        """Record one finding."""
        key = finding.code, finding.severity
        kept = self._kept.setdefault(key, [])
        self._count[key] = self._count.get(key, 0) + 1
        if self._last.get(key) != finding.row:
            self._rows[key] = self._rows.get(key, 0) + 1
            self._last[key] = finding.row
        if len(kept) < KEPT:
            kept.append(finding)

    def extend(self, findings: Iterable[DataFinding]) -> None:
        """Record several findings."""
        for finding in findings:
            self.add(finding)

    def total(self, code: str, severity: str, message: str, fix: str = "") -> None:
        """Set the message of all findings of a code, which a line of the report shows."""
        self._totals[code, severity] = message, fix

    def __iter__(self) -> Iterator[DataFinding]:
        """The findings that were kept, by code."""
        for kept in self._kept.values():
            yield from kept

    def lines(self) -> Iterator[str]:
        """A line of the report for each code."""
        for key, kept in self._kept.items():
            first, count, rows = kept[0], self._count[key], self._rows[key]
            where = f" ({first.field})" if first.field else ""
            if first.row and count > 1:
                numbers = list(dict.fromkeys(finding.row for finding in kept))[:_SHOWN]
                named = ", ".join(map(str, numbers)) + (", ..." if rows > len(numbers) else "")
                where = f" ({count} in {rows} row{'s' if rows > 1 else ''}: {named})"
            elif first.row:
                where = f" (row {first.row}{', ' + first.field if first.field else ''})"
            message, fix = self._totals.get(key, (first.message, first.fix))
            fix = f". Fix: {fix}" if fix else ""
            severity = "" if first.severity == NOTE else f"{first.severity}: "
            yield f"{severity}{first.code}: {message}{where}{fix}"

    def summary(self) -> list[dict[str, Any]]:
        """For a manifest: each code with its count, rows and first message."""
        return [
            {
                "code": code,
                "severity": severity,
                "count": self._count[code, severity],
                "rows": self._rows[code, severity] if kept[0].row else 0,
                "message": self._totals.get((code, severity), (kept[0].message, ""))[0],
            }
            for (code, severity), kept in self._kept.items()
        ]
