"""Drawing on a terminal: the reporter of long verbs, and tables.

Quiet when piped: without a terminal there are no bars, a step is a line every so often, and
notes wait until the work begins, so that an error before it is the only line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..reporting import Advance

_EVERY = 10.0  # seconds between lines where there is no terminal


class Drawn:
    """A `Reporter` on stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = 0.0
        self._held: list[str] | None = None if self.console.is_terminal else []

    def note(self, line: str) -> None:
        """One line on stderr."""
        if self._held is None:
            self.console.print(line, markup=False, soft_wrap=True)
        else:
            self._held.append(line)

    def _begin(self) -> None:
        held, self._held = self._held or (), None
        for line in held:
            self.note(line)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table on stderr."""
        self._begin()
        self.console.print(as_table(title, rows))

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        """A bar on a terminal, nothing elsewhere."""
        self._begin()
        if not self.console.is_terminal or self.console.quiet:
            yield lambda amount: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[says]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=unit == "bytes") as bar:
            self._bar, self._task = bar, bar.add_task(what, total=total, says="")
            try:
                yield lambda amount: bar.advance(self._task, amount)
            finally:
                self._bar = None

    def step(self, metrics: Mapping[str, Any]) -> None:
        """The bar's text; where there is no bar, a line every ten seconds."""
        text = _says(metrics)
        if self._bar is not None:
            self._bar.update(self._task, says=text)
        elif time.monotonic() - self._said > _EVERY or metrics.get("step") == 1:
            self._said = time.monotonic()
            self.note(f"step {metrics.get('step')}: {text}")


def _says(metrics: Mapping[str, Any]) -> str:
    text = (
        f"loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
        f"{metrics['memory_gb']:.2f} GB"
    )
    if "eval_loss" in metrics:
        text += f"  eval {metrics['eval_loss']:.4f}"
    return text


def as_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows with the same keys as a table; numbers right-aligned."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
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
    """A table on stdout."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 1000  # a pipe has no edge: one line a row
    console.print(as_table(title, rows))
