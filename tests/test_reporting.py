"""Events reach every sink, a sink that fails cannot stop a run, and one rank speaks."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcore.reporting import (
    CheckpointSaved,
    Evaluation,
    Event,
    Finished,
    JsonLines,
    Note,
    ProgressAdvanced,
    ProgressEnded,
    ProgressStarted,
    Reporter,
    RunStarted,
    Step,
    Table,
    WarningNote,
)

STEP: dict[str, Any] = {
    "step": 1, "loss": 2.5, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 9,
    "supervised_tokens": 4, "seconds": 0.5, "tokens_per_second": 18.0, "memory_gb": 0.25,
}  # fmt: skip


class Kept:
    """Keeps its events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event, /) -> None:
        self.events.append(event)

    def texts(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Note | WarningNote)]


class Failing(Kept):
    """Keeps its events and then raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def handle(self, event: Event, /) -> None:
        super().handle(event)
        raise self.error


def every_event() -> list[Event]:
    return [
        RunStarted(verb="train", model="m", output=Path("out")),
        Note(text="a note"),
        WarningNote(text="a warning"),
        Table(title="t", rows=({"a": 1},)),
        ProgressStarted(label="loading", total=3, unit="bytes"),
        ProgressAdvanced(amount=2),
        ProgressEnded(),
        Step(total=2, **STEP),
        Evaluation(step=1, eval_loss=math.inf),
        CheckpointSaved(step=1, folder=Path("run/checkpoint-1")),
        Finished(verb="train", output=Path("out"), result={"steps": 2}),
    ]


def test_every_sink_receives_every_event_in_order() -> None:
    first, second = Kept(), Kept()
    reporter = Reporter(first, second)
    for event in every_event():
        reporter.emit(event)
    assert first.events == second.events == every_event()


def test_methods_emit_the_events_of_their_names() -> None:
    kept = Kept()
    reporter = Reporter(kept)
    reporter.note("n")
    reporter.warning("w")
    reporter.lines(["plain", "warning: bad", "a warning: not at the start"])
    reporter.table("t", [{"a": 1}])
    with reporter.progress("loading", 3, "bytes") as advance:
        advance(2)
    assert kept.events == [
        Note(text="n"),
        WarningNote(text="w"),
        Note(text="plain"),
        WarningNote(text="bad"),
        Note(text="a warning: not at the start"),
        Table(title="t", rows=({"a": 1},)),
        ProgressStarted(label="loading", total=3, unit="bytes"),
        ProgressAdvanced(amount=2),
        ProgressEnded(),
    ]


def test_progress_ends_when_its_block_raises() -> None:
    kept = Kept()
    with pytest.raises(ValueError, match="no"), Reporter(kept).progress("x", 1, "steps"):
        raise ValueError("no")
    assert kept.events[-1] == ProgressEnded()


# -- containment


@pytest.mark.parametrize(
    "error", [ValueError("broken"), SystemExit(3), BrokenPipeError(), GeneratorExit()], ids=repr
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_sink_that_raises_is_dropped_with_one_note(error: BaseException, place: int) -> None:
    before, after, failing = Kept(), Kept(), Failing(error)
    sinks: list[Kept] = [before, after]
    sinks.insert(place, failing)
    reporter = Reporter(*sinks)
    for text in ("one", "two", "three"):
        reporter.note(text)
    assert failing.texts() == ["one"]
    for kept in (before, after):
        first, note, *rest = kept.texts()
        assert (first, rest) == ("one", ["two", "three"])
        assert note.startswith("Failing failed and receives no more events: ")
        assert type(error).__name__ in note
        assert "\n" not in note


def test_sinks_that_fail_at_once_and_on_the_note_are_dropped() -> None:
    class FailsOnNotes(Kept):
        def handle(self, event: Event, /) -> None:
            super().handle(event)
            if isinstance(event, Note):
                raise RuntimeError("no notes")

    kept, third = Kept(), FailsOnNotes()
    reporter = Reporter(Failing(ValueError("a")), Failing(OSError("b")), third, kept)
    reporter.warning("begin")
    reporter.warning("end")
    warnings = [text for text in kept.texts() if "failed" not in text]
    assert warnings == ["begin", "end"]
    assert sum("failed and receives no more" in text for text in kept.texts()) == 3
    assert third.texts()[:1] == ["begin"]
    assert "end" not in third.texts()


def test_a_reporter_whose_only_sink_failed_is_silent() -> None:
    reporter = Reporter(Failing(ValueError("a")))
    reporter.note("one")
    with reporter.progress("x", 1, "steps") as advance:
        advance(1)


def test_keyboard_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt):
        Reporter(Failing(KeyboardInterrupt())).note("one")


def test_what_a_sink_prints_does_not_reach_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    class Prints:
        def handle(self, event: Event, /) -> None:
            print("hello")  # noqa: T201

    Reporter(Prints()).note("one")
    assert capsys.readouterr() == ("", "hello\n")


def test_an_attached_sink_receives_the_events_of_its_block() -> None:
    kept, other = Kept(), Kept()
    reporter = Reporter(other)
    reporter.note("before")

    def block() -> None:
        with reporter.attached(kept):
            reporter.note("inside")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        block()
    reporter.note("after")
    assert kept.texts() == ["inside"]
    assert other.texts() == ["before", "inside", "after"]


def test_a_required_sink_stops_the_run() -> None:
    kept = Kept()
    reporter = Reporter(kept)
    failing = Failing(OSError("disk full"))
    with reporter.attached(failing, required=True), pytest.raises(OSError, match="disk full"):
        reporter.note("one")
    reporter.note("two")
    assert kept.texts() == ["two"]


# -- ranks


@pytest.mark.parametrize(
    ("variable", "parameter", "speaks"),
    [
        (None, None, True),
        ("0", None, True),
        ("1", None, False),
        ("3", 0, True),
        ("0", 2, False),
        ("", None, True),
        ("first", None, True),
    ],
)
def test_only_rank_0_speaks(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, parameter: int | None, speaks: bool
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if variable is not None:
        monkeypatch.setenv("RANK", variable)
    kept, attached = Kept(), Kept()
    reporter = Reporter(kept, rank=parameter)
    with reporter.attached(attached, required=True):
        reporter.note("one")
    assert kept.texts() == attached.texts() == (["one"] if speaks else [])


# -- rows and JSON


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({}, list(STEP)),
        ({"aux_loss": 0.5}, [*list(STEP)[:2], "aux_loss", *list(STEP)[2:]]),
        ({"eval_loss": 1.5}, [*STEP, "eval_loss"]),
    ],
)
def test_the_row_of_a_step_has_the_keys_of_metrics_jsonl(
    more: dict[str, Any], keys: list[str]
) -> None:
    row = Step(total=9, **STEP, **more).row()
    assert list(row) == keys
    assert row == STEP | more


def test_json_lines_are_one_object_for_each_event() -> None:
    stream = io.StringIO()
    reporter = Reporter(JsonLines(stream))
    for event in every_event():
        reporter.emit(event)
    rows = [json.loads(line, parse_constant=_refuse) for line in stream.getvalue().splitlines()]
    assert [row["event"] for row in rows] == [type(event).__name__ for event in every_event()]
    assert rows[0] == {"event": "RunStarted", "verb": "train", "model": "m", "output": "out"}
    assert rows[3]["rows"] == [{"a": 1}]
    assert rows[8]["eval_loss"] == "Infinity"


_refuse: Callable[[str], Any] = pytest.fail
