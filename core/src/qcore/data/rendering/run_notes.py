"""The notes of a run on its rows: counts, findings, refused rows, and how turns were rendered.

This file decides how the outcomes of single rows are put together, in the order of the rows, and
which findings are made on all of them. `qcore.data.rendering.row_renderer` makes the outcomes.

Codes: ``QC-DATA-046`` rows that ``long_rows`` changed, ``-047`` rows that ``bad_rows`` left out,
``-048`` rows that became several samples, ``-083`` rows that one process renders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ...api.media import RowError
from ..findings import NOTE, WARNING, DataFinding, Findings
from ..formats import IGNORED_COLUMN
from ..rejects import CUT, LONG
from ..source_counts import SourceCount
from .losses import LossCounts

if TYPE_CHECKING:
    from types import TracebackType

    from ..formats import Formats
    from ..reading import Numbered
    from ..rejects import Rejects
    from .row_renderer import RowOutcome

ONE_PROCESS: Final = "QC-DATA-083"
_AS_SERVED: Final = (
    "because the template renders earlier turns of a conversation unlike it served them "
    "(history=as_served; as_rendered trains each row in one rendering)"
)


class RunNotes:
    """What there is to say of the rows of a run.

    A context manager: the rows are rendered in its block, and the findings on all rows are made at
    its end, unless an error ends it.

    Args:
        rejects: collects refused rows.
        formats: the row formats.
        max_length: maximum tokens of a sample.
        keep_reasoning: says how to train reasoning that the template does not render.

    Attributes:
        counts: what came from each source.
        findings: what there is to say of the rows.
        dropped: rows that ``long_rows`` left out.
        truncated: rows that ``long_rows`` cut.
        asked: by number of a row: reader options that its parts set themselves.
        one_process: whether this process alone renders the rows, against ``dataset_num_proc``.
    """

    def __init__(
        self,
        rejects: Rejects,
        formats: Formats,
        max_length: int,
        keep_reasoning: Callable[[], str],
    ) -> None:
        self.rejects = rejects
        self.findings = Findings()
        self.counts: list[SourceCount] = []
        self.dropped = self.truncated = 0
        self.one_process = False
        self.asked: dict[int, frozenset[tuple[str, str]]] = {}
        self._alike: dict[frozenset[tuple[str, str]], frozenset[tuple[str, str]]] = {}
        self._formats = formats
        self._max_length = max_length
        self._keep_reasoning = keep_reasoning
        self._losses = LossCounts()
        self._samples = self._rendered = self._tokens = self._split = 0

    @property
    def rows(self) -> int:
        """Rows so far, refused ones included."""
        return sum(count.rows for count in self.counts)

    def add(self, numbered: Numbered, outcome: RowOutcome) -> None:
        """Note what became of a row.

        Raises:
            QcoreError: one that ends the run.
        """
        if outcome.fatal is not None:
            raise outcome.fatal
        self._formats.ignored.update(outcome.ignored)
        if outcome.format:
            self.counts[numbered.at].formats[outcome.format] += 1
        self.findings.extend(outcome.findings)
        if keys := outcome.asked:
            self.asked[numbered.row] = self._alike.setdefault(keys, keys)
        if outcome.error is not None:
            if outcome.tokens and isinstance(outcome.error, RowError):
                self.rejects.add_too_long(numbered, outcome.tokens, outcome.error)
            else:
                self.rejects.add(numbered, outcome.error)
            return
        lengths = [example.length for example in outcome.examples]
        if outcome.cut:
            self.rejects.add_long(numbered, outcome.tokens, self._max_length, cut=bool(lengths))
        if not lengths:
            self.dropped += 1
            return
        self._losses.add(outcome.losses)
        self.truncated += outcome.cut
        self._split += len(lengths) > 1
        self._samples += len(lengths)
        self._tokens += sum(lengths)
        self._rendered += max(lengths)

    def __enter__(self) -> RunNotes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._conclude()

    def _conclude(self) -> None:
        """Make the findings on all rows."""
        self._losses.total(self.findings, self._keep_reasoning() if self._losses.lost else "")
        left = self.rows - self.rejects.count - self.dropped
        for key, message in self._formats.notes():
            self._add(IGNORED_COLUMN, NOTE, message, field=key)
        if self._split:
            self._add(
                "QC-DATA-048",
                NOTE,
                f"{left} rows became {self._samples} samples with "
                f"{self._tokens / self._rendered:.2f} times the tokens, {_AS_SERVED}",
            )
        if self.one_process:
            self._add(
                ONE_PROCESS,
                NOTE,
                "the chat format of the plugin cannot be sent to other processes (its functions "
                "must be those of a module): this process alone renders the rows",
            )
        self._report_losses()

    def _report_losses(self) -> None:
        rejects, rows = self.rejects, self.rows
        listed = f"; {rejects.listing} lists them" if rejects.listing else ""
        for (action, policy), count in sorted(rejects.long.items()):
            what = "cut" if action == CUT else "left out"
            self._add(
                LONG,
                WARNING,
                f"{count} of {rows} rows are longer than max_length={self._max_length} "
                f"and were {what} (long_rows={policy}){listed}",
            )
        if rejects.skipped:
            self._add(
                "QC-DATA-047",
                WARNING,
                f"{rejects.skipped} of {rows} rows are bad and were left out "
                f"(bad_rows=skip){listed}",
            )

    def _add(self, code: str, severity: str, message: str, field: str = "") -> None:
        self.findings.add(
            DataFinding(code=code, severity=severity, row=0, field=field, message=message)
        )
