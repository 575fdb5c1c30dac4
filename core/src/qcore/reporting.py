"""Events that a running verb reports (steps, notes, progress), and how they reach each sink.

This file decides what verbs report and who receives it. A verb calls one `Reporter`; every
event reaches each of its sinks: the terminal, a log file, an experiment tracker, a callback.
How a sink shows an event is up to the sink.

A sink cannot stop a run: one that raises is dropped, and the other sinks receive a `Note` that
says so. Only a sink that writes a part of the result (`Reporter.attached` with
``required=True``) stops the run when it fails. Of several processes only rank 0 reports.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

from .errors import Failure, contained

__all__ = [
    "Advance",
    "CheckpointSaved",
    "Evaluation",
    "Event",
    "Finished",
    "JsonLines",
    "Note",
    "ProgressAdvanced",
    "ProgressEnded",
    "ProgressStarted",
    "Reporter",
    "RunStarted",
    "Sink",
    "SinkClosed",
    "Step",
    "Table",
    "WarningNote",
]

Advance = Callable[[int], None]  #: called with the amount done since the last call
_WARNING = "warning: "


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    """A verb begins.

    Attributes:
        verb: ``train``, ``merge``, ``generate``, ...
        model: folder or hub id, as the user named it.
        output: the folder that will be published; ``None`` for a verb that writes nothing.
    """

    verb: str
    model: str
    output: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One line: a decision and its reason, or a fact about the input."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WarningNote:
    """One line about something that is probably wrong and does not stop the verb."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows with the same keys, for people to compare."""

    title: str
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressStarted:
    """Something begins that may take more than a second; `unit` is ``bytes`` or ``steps``."""

    label: str
    total: int
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressAdvanced:
    """More of what `ProgressStarted` began is done."""

    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressEnded:
    """What `ProgressStarted` began is over, completed or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An optimizer step.

    Attributes:
        step: its number, from 1.
        total: steps of the run.
        loss: mean loss per supervised token.
        grad_norm: of all adapters, before clipping.
        learning_rate: of this step.
        tokens: of the step's rows.
        supervised_tokens: tokens that have a label.
        seconds: of the step.
        tokens_per_second: `tokens` by `seconds`.
        memory_gb: peak of the device, or of the process on the CPU, in 1e9 bytes; the largest of
            all ranks.
        aux_loss: load balance of the router; ``None`` where it is not trained.
        eval_loss: of the held-out rows, where an evaluation follows this step.
        spike: scores and rows, where loss or gradient norm is far above the steps before.
        ranks: processes that shared the step; ``None`` for a process of its own.
    """

    step: int
    total: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    seconds: float
    tokens_per_second: float
    memory_gb: float
    aux_loss: float | None = None
    eval_loss: float | None = None
    spike: Mapping[str, Any] | None = None
    ranks: int | None = None

    def row(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``; without `total` and without what is ``None``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        order = ("step", "loss", "aux_loss", *(key for key in values if key != "total"))
        return {key: values[key] for key in dict.fromkeys(order) if values[key] is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The held-out rows were evaluated.

    Attributes:
        step: optimizer steps that are done.
        eval_loss: mean loss per supervised token.
        final: the evaluation at the end of the run. The others belong to a `Step`, which
            carries the same `eval_loss`.
    """

    step: int
    eval_loss: float
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved:
    """A checkpoint of the run was published in `folder`."""

    step: int
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A verb succeeded.

    Attributes:
        verb: as in `RunStarted`.
        output: the published folder; ``None`` for a verb that writes nothing.
        result: the report as ``--json`` prints it.
    """

    verb: str
    output: Path | None
    result: Mapping[str, Any]


Event = (
    RunStarted
    | Note
    | WarningNote
    | Table
    | ProgressStarted
    | ProgressAdvanced
    | ProgressEnded
    | Step
    | Evaluation
    | CheckpointSaved
    | Finished
)


class SinkClosed(Exception):
    """Raised by a sink that can receive no more events; its text says why, for a `Note`."""


class Sink(Protocol):
    """Receives every event, in the order in which they happen."""

    def handle(self, event: Event, /) -> None:
        """Show, store or send an event; ignore the kinds that do not matter here."""
        ...


class Reporter:
    """Passes the events of verbs to sinks.

    Args:
        *sinks: receivers, in this order; none: the verb is silent.
        rank: rank of this process; by default the environment's ``RANK``, which torchrun
            sets. On other ranks than 0 no sink receives anything.

    Attributes:
        dropped: a line for each sink that was dropped.
    """

    def __init__(self, *sinks: Sink, rank: int | None = None) -> None:
        self._speaks = (_rank() if rank is None else rank) == 0
        self._sinks: list[Sink] = []
        self._required: list[Sink] = []
        self.dropped: list[str] = []
        if self._speaks:
            self._sinks += sinks

    def emit(self, event: Event) -> None:
        """Pass an event to every sink, and drop a sink that raises.

        Raises:
            KeyboardInterrupt: from any sink.
            Exception: from a required sink.
        """
        for sink in tuple(self._required):
            sink.handle(event)
        failed: list[tuple[Sink, Failure]] = []
        for sink in tuple(self._sinks):
            outcome = contained(partial(sink.handle, event))
            if isinstance(outcome, Failure):
                failed.append((sink, outcome))
        # All of them first: a note about one must not reach another that has failed.
        self._sinks = [sink for sink in self._sinks if all(sink is not bad for bad, _ in failed)]
        for sink, failure in failed:
            line = f"{type(sink).__name__} failed and receives no more events: {failure}"
            if isinstance(failure.error, SinkClosed):
                line = str(failure.error)
            self.dropped.append(line)
            self.note(line)

    @contextmanager
    def attached(self, sink: Sink, *, required: bool = False) -> Iterator[None]:
        """Add a sink for the duration of a block.

        Args:
            sink: the sink; on other ranks than 0 it receives nothing.
            required: what it writes is a part of the result, so its exceptions are raised.
        """
        if not self._speaks:
            yield
            return
        (self._required if required else self._sinks).append(sink)
        try:
            yield
        finally:
            self._required = [other for other in self._required if other is not sink]
            self._sinks = [other for other in self._sinks if other is not sink]

    def note(self, text: str) -> None:
        """Report one line."""
        self.emit(Note(text=text))

    def warning(self, text: str) -> None:
        """Report one line about something that is probably wrong."""
        self.emit(WarningNote(text=text))

    def lines(self, lines: Iterable[str]) -> None:
        """Report lines of preflight or the planner; those that begin ``warning:`` are warnings."""
        for line in lines:
            if line.startswith(_WARNING):
                self.warning(line.removeprefix(_WARNING))
            else:
                self.note(line)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report rows that have the same keys."""
        self.emit(Table(title=title, rows=tuple(rows)))

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        """Report the progress of a block.

        Args:
            label: what is done, e.g. ``loading the base``.
            total: of `unit`.
            unit: ``bytes``, ``steps``, ...

        Yields:
            A function to call with the amount done since its last call.
        """
        self.emit(ProgressStarted(label=label, total=total, unit=unit))
        try:
            yield lambda amount: self.emit(ProgressAdvanced(amount=amount))
        finally:
            self.emit(ProgressEnded())


def _rank() -> int:
    """``RANK``, or 0 where no launcher set it."""
    text = os.environ.get("RANK", "")
    return int(text) if text.isascii() and text.isdigit() else 0


class JsonLines:
    """A sink that writes each event as one line of JSON: ``{"event": "Step", ...}``.

    Args:
        stream: an open text file; it is flushed after every event and not closed.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def handle(self, event: Event, /) -> None:
        """Write one line."""
        facts = {field.name: getattr(event, field.name) for field in fields(event)}
        line = plain({"event": type(event).__name__, **facts})
        self._stream.write(json.dumps(line, allow_nan=False, default=str) + "\n")
        self._stream.flush()


def plain(value: Any) -> Any:
    """`value` for JSON: NaN and infinities become ``"NaN"``, ``"Infinity"``, ``"-Infinity"``."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
