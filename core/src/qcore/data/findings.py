"""Findings on the rows of a run: what was repaired, dropped or left out, and what it means.

This file decides the record of one finding and how the findings of many rows are put together.
What is looked for is up to `qcore.data.repairs.repair`, `qcore.data.rendering.samples` and the
other readers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
KEPT = 1000  #: findings of one code that are kept; the others are counted
KINDS = 50  #: kinds of statements of one code that have a line of their own
_MORE = "..."
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|\b\d+\b")  #: names and numbers in a message
_PLURAL = re.compile(r"s\b| (is|are)\b")  #: what a number changes in the words around it
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
        what: kind of the statement; empty: its message without names and numbers.
    """

    code: str
    severity: str
    row: int
    field: str
    message: str
    fix: str = ""
    what: str = ""

    @property
    def kind(self) -> str:
        """What findings that are put together have in common.

        A finding on all rows stands alone: it is a total already.
        """
        if self.what or not self.row:
            return self.what or self.message
        return _PLURAL.sub("", _VARIABLE.sub("#", self.message).partition(": ")[0])

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


@dataclass(slots=True)
class FindingGroup:
    """The findings of one code and severity that state the same.

    Attributes:
        first: the first of them.
        kept: the first `KEPT` of them.
        count: their number.
        rows: number of their rows.
        total: message and fix on all of them; empty: those of `first`.
        mixed: whether it holds statements of several kinds, because a code has more than `KINDS`.
    """

    first: DataFinding
    kept: list[DataFinding] = field(default_factory=list)
    count: int = 0
    rows: int = 0
    total: tuple[str, str] | None = None
    mixed: bool = False
    _last: int = -1

    def add(self, finding: DataFinding) -> None:
        """Count a finding."""
        self.count += 1
        if self._last != finding.row:
            self.rows, self._last = self.rows + 1, finding.row
        if len(self.kept) < KEPT:
            self.kept.append(finding)

    @property
    def message(self) -> str:
        """What a line of the report states."""
        message = self.first.message if self.total is None else self.total[0]
        return f"more findings, the first of them: {message}" if self.mixed else message

    @property
    def fix(self) -> str:
        """What to do about it."""
        return self.first.fix if self.total is None else self.total[1]

    def line(self) -> str:
        """The line of the report."""
        first = self.first
        where = f" ({first.field})" if first.field else ""
        if first.row and self.count > 1:
            numbers = list(dict.fromkeys(finding.row for finding in self.kept))[:_SHOWN]
            named = ", ".join(map(str, numbers)) + (", ..." if self.rows > len(numbers) else "")
            where = f" ({self.count} in {self.rows} row{'s' if self.rows > 1 else ''}: {named})"
        elif first.row:
            where = f" (row {first.row}{', ' + first.field if first.field else ''})"
        fix = f". Fix: {self.fix}" if self.fix else ""
        severity = "" if first.severity == NOTE else f"{first.severity}: "
        return f"{severity}{first.code}: {self.message}{where}{fix}"

    def summary(self) -> dict[str, Any]:
        """The entry of a manifest."""
        return {
            "code": self.first.code,
            "severity": self.first.severity,
            "count": self.count,
            "rows": self.rows if self.first.row else 0,
            "message": self.message,
        }


class Findings:
    """Collects the findings of a data set, in the order in which they are made.

    Findings of one code and severity that state the same are one line of the report: the number of
    rows, the message of the first one and the rows' numbers.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, str], FindingGroup] = {}
        self._kinds: Counter[tuple[str, str]] = Counter()

    def add(self, finding: DataFinding) -> None:
        """Record one finding."""
        of = finding.code, finding.severity
        key = (*of, finding.kind)
        if key not in self._groups:
            if mixed := self._kinds[of] >= KINDS:
                key = (*of, _MORE)
            if key not in self._groups:
                self._groups[key] = FindingGroup(first=finding, mixed=mixed)
                self._kinds[of] += 1
        self._groups[key].add(finding)

    def extend(self, findings: Iterable[DataFinding]) -> None:
        """Record several findings."""
        for finding in findings:
            self.add(finding)

    def total(self, code: str, severity: str, message: str, fix: str = "") -> None:
        """Set the message on all findings of a code; they must be of one kind."""
        for (*of, _), group in self._groups.items():
            if of == [code, severity]:
                group.total = message, fix

    def state(self) -> list[dict[str, Any]]:
        """Everything that was collected, as JSON."""
        return [{"key": list(key), **asdict(group)} for key, group in self._groups.items()]

    @classmethod
    def of(cls, state: Iterable[Mapping[str, Any]]) -> Findings:
        """The findings of a `state`."""
        found = cls()
        for values in state:
            code, severity, kind = values["key"]
            total = values["total"]
            group = {
                **{name: value for name, value in values.items() if name != "key"},
                "first": DataFinding(**values["first"]),
                "kept": [DataFinding(**finding) for finding in values["kept"]],
                "total": None if total is None else tuple(total),
            }
            found._groups[code, severity, kind] = FindingGroup(**group)
            found._kinds[code, severity] += 1
        return found

    def groups(self) -> Iterator[FindingGroup]:
        """The findings by code, severity and kind of statement."""
        yield from self._groups.values()

    def __iter__(self) -> Iterator[DataFinding]:
        """The findings that were kept, by group."""
        for group in self._groups.values():
            yield from group.kept

    def lines(self) -> Iterator[str]:
        """A line of the report for each group."""
        yield from (group.line() for group in self._groups.values())

    def summary(self) -> list[dict[str, Any]]:
        """For a manifest: each group with its count, rows and message."""
        return [group.summary() for group in self._groups.values()]
