"""The report on a data set: counts, and all findings of one pass, refused rows included.

This file decides how a refused row becomes a finding and what a line of the report counts. What is
found is decided by the readers (`qcore.data.findings`, `qcore.data.rejects`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import QcoreError
from ..findings import DataFinding
from ..rendering.chat_record import TrainedTurns

if TYPE_CHECKING:
    from ..findings import Findings
    from ..rejects import Rejects
    from ..rendering.renderer import Renderer
    from ..sources.source import Source

_NAMED = 5  #: rows that a line of the report names


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingLine:
    """All findings of one code and severity that state the same; refused rows: of one code.

    Attributes:
        severity: ``error``, ``warning`` or ``note``.
        code: stable code.
        count: number of findings.
        rows: numbers of the first rows; empty for findings on all rows.
        message: of the first one.
        fix: of the first one.
        field: of the first one.
    """

    severity: str
    code: str
    count: int
    rows: tuple[int, ...]
    message: str
    fix: str
    field: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The result of `check_rows`.

    Attributes:
        rows: rows of all sources, refused ones included.
        samples: samples that are trained.
        rejected: refused rows.
        tokens: tokens of all samples.
        supervised: trained tokens of all samples.
        formats: rows by format.
        lines: findings by code.
        longest: tokens of the longest sample.
        listed: the rows that are refused, skipped, dropped or cut.
        noted: the findings on the other rows and on all of them.
        error: why training would stop; ``None`` if it would not.
    """

    rows: int
    samples: int
    rejected: int
    tokens: int
    supervised: int
    formats: dict[str, int]
    lines: tuple[FindingLine, ...]
    longest: int
    listed: Rejects
    noted: Findings
    error: QcoreError | None = None

    def findings(self) -> Iterator[DataFinding]:
        """The findings; refused, dropped and cut rows first, in the order of their detection."""
        yield from self.listed.findings()
        yield from self.noted

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore data check --json``, but for its ``findings``."""
        return {
            "rows": self.rows,
            "samples": self.samples,
            "rejected": self.rejected,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "formats": self.formats,
        }


@dataclass(slots=True)
class _Sums:
    samples: int = 0
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    trained: TrainedTurns = field(default_factory=TrainedTurns)


def check_rows(renderer: Renderer, sources: Sequence[Source]) -> CheckReport:
    """Render all rows as training would, and report what there is to say.

    Args:
        renderer: of the model; it has rendered no row yet.
        sources: where the rows come from.

    Raises:
        InputError: as `Renderer.examples`. Refused rows are not raised: see `CheckReport.error`.
    """
    sums = _Sums()
    with renderer.notes:
        for example in renderer.examples(sources):
            sums.samples += 1
            sums.tokens += example.length
            sums.supervised += example.supervised
            sums.longest = max(sums.longest, example.length)
            sums.trained.add(example)
    if sums.trained.turns:
        renderer.record(sums.trained)
    error: QcoreError | None = None
    try:
        renderer.rejects.stop(renderer.notes.counts)
    except QcoreError as stopped:
        error = stopped
    formats: Counter[str] = Counter()
    for count in renderer.notes.counts:
        formats.update(count.formats)
    return CheckReport(
        rows=renderer.rows,
        samples=sums.samples,
        rejected=renderer.rejects.count,
        tokens=sums.tokens,
        supervised=sums.supervised,
        formats=dict(sorted(formats.items())),
        lines=tuple(_lines(renderer)),
        longest=sums.longest,
        listed=renderer.rejects,
        noted=renderer.notes.findings,
        error=error,
    )


def _lines(renderer: Renderer) -> Iterator[FindingLine]:
    """The lines of the report: rows of the list by code and severity, then the other findings."""
    listed: dict[tuple[str, str], _Listed] = {}
    for finding in renderer.rejects.findings():
        listed.setdefault((finding.code, finding.severity), _Listed(finding)).add(finding)
    for one in listed.values():
        yield _line(one.first, one.rows, one.count, one.first.message)
    for group in renderer.notes.findings.groups():
        rows = list(dict.fromkeys(finding.row for finding in group.kept if finding.row))
        yield _line(group.first, rows, group.count, group.message)


@dataclass(slots=True)
class _Listed:
    first: DataFinding
    count: int = 0
    rows: list[int] = field(default_factory=list)

    def add(self, finding: DataFinding) -> None:
        self.count += 1
        if len(self.rows) <= _NAMED:
            self.rows.append(finding.row)


def _line(first: DataFinding, rows: Sequence[int], count: int, message: str) -> FindingLine:
    return FindingLine(
        severity=first.severity, code=first.code, count=count, rows=tuple(rows[: _NAMED + 1]),
        message=message, fix=first.fix, field=first.field,
    )  # fmt: skip
