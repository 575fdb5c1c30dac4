"""What a verb tells while it runs: the protocol that the command line draws.

Verbs are silent by themselves. They call a `Reporter`; `Silent` is the one for libraries and
pipes, the command line has one with tables and progress bars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

Advance = Callable[[int], None]  #: called with the amount done since the last call


class Reporter(Protocol):
    """Receives what a verb has to say."""

    def note(self, line: str) -> None:
        """One line: a decision and its reason, a warning of preflight."""
        ...

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows with the same keys, for people to compare."""
        ...

    def progress(self, what: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A bar for something that takes over a second; `unit` is ``bytes``, ``steps``, ..."""
        ...

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One optimizer step's numbers, the line of ``metrics.jsonl``."""
        ...


class Silent:
    """Says nothing."""

    def note(self, line: str) -> None:
        """Drop it."""

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Drop it."""

    def progress(self, what: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A bar that nobody sees."""
        return nullcontext(lambda amount: None)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Drop it."""
