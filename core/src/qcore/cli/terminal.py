"""The terminal: the sink that draws the events of long verbs, and tables on stdout.

Quiet when piped: without a terminal there are no bars, a step is a line every so often, and
notes wait until the work begins, so that an error before it is the only line.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import table as rich_table
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..reporting import (
    Evaluation,
    Event,
    Finished,
    Note,
    ProgressAdvanced,
    ProgressEnded,
    ProgressStarted,
    Reporter,
    SinkClosed,
    Step,
    Table,
    WarningNote,
)
from .output import lost

_EVERY = 10.0  # seconds between lines where there is no terminal


def terminal_reporter(*, quiet: bool = False) -> Reporter:
    """A reporter whose only sink is the terminal."""
    return Reporter(TerminalSink(quiet=quiet))


class TerminalSink:
    """Draws events on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0
        self._waiting: list[str] | None = None if self.console.is_terminal else []

    def handle(self, event: Event, /) -> None:
        """Draw an event; those that have no form here are ignored.

        Raises:
            SinkClosed: standard error cannot be written.
        """
        self._draw(event)
        if (reason := lost(self.console.file)) is not None:
            self._stop_bar()
            raise SinkClosed(f"progress is off: standard error cannot be written ({_of(reason)})")

    def _draw(self, event: Event) -> None:
        match event:
            case Note(text=text):
                self._line(text)
            case WarningNote(text=text):
                self._line(f"warning: {text}")
            case Table():
                self._begin()
                self.console.print(as_table(event.title, event.rows))
            case ProgressStarted():
                self._start_bar(event)
            case ProgressAdvanced(amount=amount):
                if self._bar is not None:
                    self._bar.advance(self._task, amount)
            case ProgressEnded():
                self._stop_bar()
            case Finished():
                self._begin()
            case Step():
                self._step(event)
            case Evaluation(final=True):
                self._line(f"step {event.step}: eval {event.eval_loss:.4f}")
            case _:
                pass

    def _line(self, line: str) -> None:
        if self._waiting is None:
            self.console.print(line, markup=False, soft_wrap=True)
        else:
            self._waiting.append(line)

    def _begin(self) -> None:
        """The work begins: print the lines that waited."""
        waiting, self._waiting = self._waiting or (), None
        for line in waiting:
            self._line(line)

    def _start_bar(self, event: ProgressStarted) -> None:
        """A bar on a terminal, nothing elsewhere."""
        self._begin()
        if not self.console.is_terminal or self.console.quiet:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        transient = event.unit == "bytes"
        # Not stdout: the dispatcher replaces it while a sink runs, and rich would put that back.
        self._bar = Progress(
            *columns, console=self.console, transient=transient, redirect_stdout=False
        )
        self._task = self._bar.add_task(event.label, total=event.total, metrics="")
        self._bar.start()

    def _stop_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def _step(self, event: Step) -> None:
        """The bar's text; where there is no bar, a line every ten seconds."""
        text = _metrics(event)
        if self._bar is not None:
            self._bar.update(self._task, metrics=text)
        elif (
            time.monotonic() - self._last_line > _EVERY
            or event.step in (1, event.total)
            or event.eval_loss is not None
        ):
            self._last_line = time.monotonic()
            self._line(f"step {event.step}: {text}")


def _of(reason: OSError) -> str:
    return reason.strerror or str(reason)


def _metrics(step: Step) -> str:
    text = f"loss {step.loss:.4f}  {step.tokens_per_second:,.0f} tokens/s  {step.memory_gb:.2f} GB"
    if step.eval_loss is not None:
        text += f"  eval {step.eval_loss:.4f}"
    return text


def as_table(title: str, rows: Sequence[Mapping[str, Any]]) -> rich_table.Table:
    """Rows with the same keys as a table; numbers right-aligned."""
    table = rich_table.Table(title=title, title_justify="left", box=None, pad_edge=False)
    for key, value in (rows[0] if rows else {}).items():
        right = isinstance(value, int | float) and not isinstance(value, bool)
        table.add_column(key, justify="right" if right else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else str(value)


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table on stdout."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 1000  # a pipe has no edge: one line a row
    console.print(as_table(title, rows))
