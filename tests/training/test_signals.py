"""Signals of a run: seen at once, a checkpoint first, and what is said of it is true."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import apart
from support.e2e_kit import tiny_folder
from support.process_kit import (
    Process,
    forked,
    held,
    pseudoterminal,
    read_terminal,
    wait_for,
)
from support.run_kit import SHORT, raw, start, words
from support.sinks import Heard
from support.tiers import fast

from qcore.data.rendering import row_pool
from qcore.errors import Interrupted
from qcore.io.artifact import verify
from qcore.io.stop_signals import StopNow, StopSignals
from qcore.reporting import CheckpointSaved
from qcore.training import loading, setup
from qcore.training.collate import Batches
from qcore.training.step import Loop

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = SHORT | {
    "max_steps": 4, "learning_rate": 5e-3, "eval_fraction": 0.25, "eval_steps": 2,
}  # fmt: skip
STOPS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGXCPU")
#: Where a signal comes -> function that is held, call, the checkpoint and what the error says.
PLACES: dict[str, tuple[Any, str, int, int, str]] = {
    "rendering": (setup, "dataset", 1, 0, "while the rows were prepared"),
    "loading": (loading, "load", 1, 0, "while the base was loading"),
    "evaluation": (Loop, "evaluate", 1, 2, "in the evaluation after step 2 of 4"),
    "media in an evaluation": (Batches, "of", 3, 2, "in the evaluation after step 2 of 4"),
    "last evaluation": (Loop, "evaluate", 2, 4, "after step 4 of 4"),
}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows less what a clock or the process says."""
    measured = ("seconds", "tokens_per_second", "memory_gb")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row if key not in measured} for row in lines]


@pytest.fixture
def run(rows: Path, tmp_path: Path) -> Callable[..., Process]:
    """``qcore train`` into ``out``; the function of a place is held."""

    def begin(place: str = "", *more: object, settings: Any = SETTINGS, **how: Any) -> Process:
        def before() -> None:
            if place:
                owner, name, at, *_ = PLACES[place]
                held(owner, name, tmp_path / "mark", at=at)

        line = words(tiny_folder(), rows, tmp_path / "out", settings)
        return forked(tmp_path, *line, *more, **({"before": before} | how))

    return begin


CASES = [f"{place} {name}" for place in PLACES for name in STOPS]


@pytest.mark.parametrize("case", fast(CASES, "loading SIGTERM"))
def test_a_signal_is_seen_within_two_seconds(
    run: Callable[..., Process], rows: Path, tmp_path: Path, case: str
) -> None:
    place, _, name = case.rpartition(" ")
    process = run(place)
    wait_for(tmp_path / "mark", process)
    began = time.monotonic()
    process.kill(getattr(signal, name))
    assert process.status() == 75
    assert time.monotonic() - began < 2
    *_, said, error = process.lines()
    assert said.startswith(f"{name}: ")
    saved, where = PLACES[place][3:]
    assert f"stopped by {name} {where}" in error
    assert not (tmp_path / "out").exists()
    if not saved:
        assert not (tmp_path / "out.run").exists()
        assert error.endswith("Fix: run the same command again")
        return
    assert verify(tmp_path / "out.run" / f"checkpoint-{saved}").ok
    assert error.endswith("Fix: run the same command with --resume")
    start(tiny_folder(), rows, tmp_path / "out", SETTINGS, resume=True)
    start(tiny_folder(), rows, tmp_path / "whole", SETTINGS)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_due_checkpoint_comes_before_a_due_evaluation(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the evaluation then costs the evaluation and no step."""
    options = SETTINGS | {"save_steps": 2, "load_best_at_end": True}
    start(tiny_folder(), rows, tmp_path / "whole", options)

    class Killed(BaseException):
        pass

    def evaluate(self: Loop, between: object = None) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "evaluate", evaluate)
        with pytest.raises(Killed):
            start(tiny_folder(), rows, tmp_path / "out", options)
    assert verify(tmp_path / "out.run" / "checkpoint-2").ok
    start(tiny_folder(), rows, tmp_path / "out", options, resume=True)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")


def test_sigusr1_saves_and_goes_on(rows: Path, tmp_path: Path) -> None:
    heard = Heard(1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    settings = SETTINGS | {"max_steps": 3, "eval_fraction": 0.0, "eval_steps": 0}
    start(tiny_folder(), rows, tmp_path / "out", settings, reporter=heard.reporter)
    assert [event.step for event in heard.all(CheckpointSaved)] == [2]
    assert verify(tmp_path / "out").ok


@pytest.mark.slow
def test_sigusr1_in_an_evaluation_saves_before_it_ends(
    run: Callable[..., Process], tmp_path: Path
) -> None:
    process = run("media in an evaluation", before=lambda: held(
        Batches, "of", tmp_path / "mark", at=3, seconds=1.0,
    ))  # fmt: skip
    wait_for(tmp_path / "mark", process)
    process.kill(signal.SIGUSR1)
    assert process.status() == 0
    assert verify(tmp_path / "out.run" / "checkpoint-2").ok
    assert verify(tmp_path / "out").ok


@pytest.mark.slow
def test_a_step_that_outlasts_the_grace_is_abandoned(
    run: Callable[..., Process], rows: Path, tmp_path: Path
) -> None:
    """Its gradients are dropped, and the checkpoint is that of the step before it."""
    settings = SETTINGS | {"grace_seconds": 3, "eval_fraction": 0.0, "eval_steps": 0}
    process = run(settings=settings, before=lambda: held(
        Batches, "of", tmp_path / "mark", at=3,
    ))  # fmt: skip
    wait_for(tmp_path / "mark", process)
    began = time.monotonic()
    process.kill(signal.SIGTERM)
    assert process.status() == 75
    assert 1 < time.monotonic() - began < 3.5
    assert "stopped by SIGTERM in step 3 of 4, which was abandoned" in process.lines()[-1]
    assert verify(tmp_path / "out.run" / "checkpoint-2").ok
    start(tiny_folder(), rows, tmp_path / "out", settings, resume=True)
    start(tiny_folder(), rows, tmp_path / "whole", settings)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


# -- a terminal


@pytest.mark.parametrize("saved", fast([True, False], True))
def test_the_first_interrupt_is_acknowledged_and_the_second_ends(
    run: Callable[..., Process], rows: Path, tmp_path: Path, saved: bool
) -> None:
    settings = SETTINGS | {"eval_fraction": 0.0, "eval_steps": 0, "save_steps": 1 if saved else 0}
    master, slave = pseudoterminal()
    process = run(settings=settings, terminal=slave, before=lambda: held(
        Loop, "step", tmp_path / "mark", at=2,
    ))  # fmt: skip
    os.close(slave)
    wait_for(tmp_path / "mark", process)
    began = time.monotonic()
    os.write(master, b"\x03")
    read_terminal(master, "SIGINT: finishing step 2 of 4, then writing a checkpoint and ending; "
                  "press Ctrl-C again to end at once", 10)  # fmt: skip
    assert time.monotonic() - began < 0.5
    time.sleep(0.6)
    began = time.monotonic()
    os.write(master, b"\x03")
    fix = "run the same command with --resume" if saved else "run the same command again"
    read_terminal(master, fix, 10)
    assert process.status() == 75
    assert time.monotonic() - began < 1
    assert (tmp_path / "out.run" / "checkpoint-1").is_dir() == saved
    start(tiny_folder(), rows, tmp_path / "out", settings, resume=saved)


@pytest.mark.slow
def test_a_terminal_that_closes_saves_and_goes_on(
    run: Callable[..., Process], tmp_path: Path
) -> None:
    settings = SETTINGS | {"eval_fraction": 0.0, "eval_steps": 0}
    master, slave = pseudoterminal()
    process = run(settings=settings, terminal=slave, before=lambda: held(
        Loop, "step", tmp_path / "mark", at=2, seconds=1.0,
    ))  # fmt: skip
    os.close(slave)
    wait_for(tmp_path / "mark", process)
    os.close(master)
    assert process.status() == 0
    assert verify(tmp_path / "out").ok
    assert verify(tmp_path / "out.run" / "checkpoint-2").ok
    (note,) = [row["note"] for row in metrics(tmp_path / "out") if "note" in row]
    assert note == "progress is off: standard error cannot be written (Input/output error)"


@pytest.mark.slow
def test_a_terminal_that_closes_ends_a_run_whose_json_it_would_show(
    run: Callable[..., Process], tmp_path: Path
) -> None:
    settings = SETTINGS | {"eval_fraction": 0.0, "eval_steps": 0}
    master, slave = pseudoterminal()
    process = run("", "--json", settings=settings, terminal=slave, before=lambda: held(
        Loop, "step", tmp_path / "mark", at=2, seconds=1.0,
    ))  # fmt: skip
    os.close(slave)
    wait_for(tmp_path / "mark", process)
    os.close(master)
    assert process.status() == 75
    assert verify(tmp_path / "out.run" / "checkpoint-2").ok


# -- the handlers


def test_a_block_is_abandoned_at_once_or_once_the_grace_is_over() -> None:
    with StopSignals() as stop:
        stop.grace, stop.reserve = 0.3, 0.1
        with pytest.raises(StopNow), stop.abandoning(late=True):  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            began = time.monotonic()
            while time.monotonic() - began < 5:
                time.sleep(0.01)
        assert 0.1 < time.monotonic() - began < 2
        assert stop.asked == "SIGTERM"
        with pytest.raises(StopNow), stop.abandoning():
            pass
        with pytest.raises(StopNow), stop.abandoning():  # noqa: PT012
            with stop.finishing():
                time.sleep(0.01)
            pytest.fail("goes on")


def test_one_press_that_comes_twice_is_one() -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked == "SIGINT"


def test_what_the_parent_ignores_stays_ignored_and_handlers_return() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as outer, outer:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) == outer._handle
        assert outer.asked == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_run_in_a_library_is_stopped_as_before(rows: Path, tmp_path: Path) -> None:
    heard = Heard(1, lambda: os.kill(os.getpid(), signal.SIGXCPU))
    with pytest.raises(Interrupted, match="stopped by SIGXCPU after step 1 of 4"):
        start(tiny_folder(), rows, tmp_path / "out", SETTINGS, reporter=heard.reporter)


# -- a process group


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_group_does_not_end_the_processes_that_render_rows(
    run: Callable[..., Process], tmp_path: Path, name: str
) -> None:
    """Schedulers signal every process of a job."""
    settings = SETTINGS | {"dataset_num_proc": 2, "max_steps": 1, "eval_steps": 0}
    process = run(settings=settings, group=True, before=lambda: held(
        row_pool._Worker, "ask", tmp_path / "mark", seconds=1.0,
    ))  # fmt: skip
    wait_for(tmp_path / "mark", process)
    os.killpg(process.pid, getattr(signal, name))
    status = process.status()
    if name == "SIGUSR1":
        assert status == 0
    else:
        assert status == 75
        assert f"stopped by {name} while the rows were prepared" in process.lines()[-1]


# -- after the end


@pytest.mark.parametrize("name", [*STOPS, "SIGUSR1"])
def test_a_signal_while_the_interpreter_shuts_down_changes_nothing(name: str) -> None:
    code = (
        "import atexit, os, signal, sys\n"
        "from qcore.cli.main import main\n"
        f"atexit.register(os.kill, os.getpid(), signal.{name})\n"
        "sys.argv = ['qcore', '--version']\n"
        "main()\n"
    )
    ended = apart(command=(sys.executable, "-c", code))
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.slow
def test_a_signal_after_the_adapter_was_published_changes_nothing(
    run: Callable[..., Process], tmp_path: Path
) -> None:
    import qcore.cli.train

    def before() -> None:
        def log(text: str) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        qcore.cli.train.log = log

    settings = SETTINGS | {"eval_fraction": 0.0, "eval_steps": 0, "max_steps": 1}
    process = run(settings=settings, before=before)
    assert process.status() == 0
    assert verify(tmp_path / "out").ok
