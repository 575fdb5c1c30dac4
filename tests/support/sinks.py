"""A sink that keeps what a verb reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from qcore.reporting import Event, Note, ProgressAdvanced, Reporter, Step, Table, WarningNote

_E = TypeVar("_E")


class Heard:
    """Keeps every event.

    Args:
        at: a step at which to do something.
        do: what, e.g. send a signal; an exception would drop this sink.
    """

    def __init__(self, at: int = 0, do: Callable[[], None] | None = None) -> None:
        self.events: list[Event] = []
        self._at, self._do = at, do

    def handle(self, event: Event, /) -> None:
        self.events.append(event)
        if self._do is not None and isinstance(event, Step) and event.step == self._at:
            self._do()

    @property
    def reporter(self) -> Reporter:
        """A reporter of one process, with this sink alone."""
        return Reporter(self, rank=0)

    def all(self, kind: type[_E]) -> list[_E]:
        """The events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def notes(self) -> list[str]:
        """Lines as a terminal shows them."""
        return [
            f"warning: {event.text}" if isinstance(event, WarningNote) else event.text
            for event in self.events
            if isinstance(event, Note | WarningNote)
        ]

    @property
    def tables(self) -> list[Table]:
        return self.all(Table)

    @property
    def steps(self) -> list[Step]:
        return self.all(Step)

    @property
    def done(self) -> int:
        """The sum of all progress."""
        return sum(event.amount for event in self.all(ProgressAdvanced))

    def said(self, start: str) -> list[str]:
        """The lines that begin so."""
        return [line for line in self.notes if line.startswith(start)]
