"""The report on a data set: counts, and all findings of one pass, refused rows included.

This file decides how a refused row becomes a finding and what a line of the report counts. What is
found is decided by the readers (`qcore.data.findings`, `qcore.data.rejects`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...errors import QcoreError
from ..findings import ERROR, WARNING, DataFinding
from ..policies import SKIP
from ..rendering.chat_record import TrainedTurns

if TYPE_CHECKING:
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
        findings: refused rows first, in the order of their detection.
        lines: findings by code.
        longest: tokens of the longest sample.
        error: why training would stop; ``None`` if it would not.
    """

    rows: int
    samples: int
    rejected: int
    tokens: int
    supervised: int
    formats: dict[str, int]
    findings: tuple[DataFinding, ...]
    lines: tuple[FindingLine, ...]
    longest: int
    error: QcoreError | None = None

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore data check --json``."""
        return {
            "rows": self.rows,
            "samples": self.samples,
            "rejected": self.rejected,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "formats": self.formats,
            "findings": [finding.as_json() for finding in self.findings],
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
            sums.tokens += len(example.ids)
            sums.supervised += example.supervised
            sums.longest = max(sums.longest, len(example.ids))
            sums.trained.add(example)
    if sums.trained.turns:
        renderer.record(sums.trained)
    error: QcoreError | None = None
    try:
        renderer.rejects.stop(renderer.rows)
    except QcoreError as stopped:
        error = stopped
    refused = list(_refused(renderer))
    formats: Counter[str] = Counter()
    for count in renderer.notes.counts:
        formats.update(count.formats)
    findings = (*refused, *renderer.notes.findings)
    return CheckReport(
        rows=renderer.rows,
        samples=sums.samples,
        rejected=renderer.rejects.count,
        tokens=sums.tokens,
        supervised=sums.supervised,
        formats=dict(sorted(formats.items())),
        findings=findings,
        lines=tuple(_lines(refused, renderer)),
        longest=sums.longest,
        error=error,
    )


def _refused(renderer: Renderer) -> Iterator[DataFinding]:
    """A finding for each refused row; a warning if ``bad_rows=skip`` leaves it out."""
    skip = renderer.options.policies.bad_rows == SKIP
    for entry in renderer.rejects.entries():
        yield DataFinding(
            code=entry["code"],
            severity=WARNING if skip else ERROR,
            row=entry["row"],
            field=entry["field"],
            message=entry["reason"],
            fix=entry["fix"],
        )


def _lines(refused: Sequence[DataFinding], renderer: Renderer) -> Iterator[FindingLine]:
    by_code: dict[tuple[str, str], list[DataFinding]] = {}
    for finding in refused:
        by_code.setdefault((finding.code, finding.severity), []).append(finding)
    for (code, severity), found in by_code.items():
        yield _line(code, severity, found, len(found))
    for group in renderer.notes.findings.groups():
        line = _line(group.first.code, group.first.severity, group.kept, group.count)
        yield replace(line, message=group.message)


def _line(code: str, severity: str, found: Sequence[DataFinding], count: int) -> FindingLine:
    first = found[0]
    rows = tuple(dict.fromkeys(finding.row for finding in found if finding.row))
    return FindingLine(
        severity=severity, code=code, count=count, rows=rows[: _NAMED + 1],
        message=first.message, fix=first.fix, field=first.field,
    )  # fmt: skip
