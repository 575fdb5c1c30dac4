"""The sink that writes ``metrics.jsonl``: steps and evaluations of a run, one JSON object a line.

This file decides which steps are logged: the first, the last, every `every`-th, those with a
spike, and those that an evaluation follows, and a note for each sink that was dropped. How lines
reach the disk is up to `io.metrics_log`. The file is a part of the adapter folder, so `train`
attaches this sink as a required one.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..io.metrics_log import MetricsLog
from ..reporting import Evaluation, Event, Step


class MetricsSink:
    """Writes steps and the last evaluation of a run to its log.

    Args:
        log: open for writing.
        every: the setting ``logging_steps``.
        dropped: lines on sinks that were dropped; it may grow.
    """

    def __init__(self, log: MetricsLog, *, every: int, dropped: Sequence[str] = ()) -> None:
        self._log = log
        self._every = every
        self._dropped = dropped
        self._noted = 0

    def handle(self, event: Event, /) -> None:
        """Write a row; an evaluation after a step is a part of the step's row.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006``.
        """
        for line in self._dropped[self._noted :]:
            self._log.write({"note": line})
            self._noted += 1
        if isinstance(event, Step) and self._is_logged(event):
            self._log.write(event.row())
        elif isinstance(event, Evaluation) and event.final:
            self._log.write({"step": event.step, "eval_loss": event.eval_loss})

    def _is_logged(self, event: Step) -> bool:
        notable = event.step in (1, event.total) or event.spike is not None
        return notable or event.step % self._every == 0 or event.eval_loss is not None
