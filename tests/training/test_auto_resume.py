"""``--auto-resume``: the same command starts, continues or reports that it is finished."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import here
from support.e2e_kit import tiny_folder
from support.process_kit import forked, held, wait_for
from support.run_kit import SHORT, raw, start, stop_at, words
from support.sinks import Heard
from support.tiers import fast

from qcore.errors import InputError, Interrupted, UsageError, WriteError
from qcore.io.artifact import verify
from qcore.io.run_lock import Lock
from qcore.reporting import Finished
from qcore.training.step import Loop

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = SHORT | {"max_steps": 3, "learning_rate": 5e-3, "save_steps": 1}


def run(rows: Path, output: Path, heard: Heard | None = None, **more: Any) -> Any:
    settings = SETTINGS | more.pop("settings", {})
    reporter = (heard or Heard()).reporter
    return start(
        tiny_folder(), rows, output, settings, reporter=reporter, **({"auto_resume": True} | more)
    )


@pytest.fixture(scope="module")
def finished(rows: Path, once: Callable[..., Path]) -> Path:
    """A finished run with its run folder."""
    return once("auto-resume", lambda home: run(rows, home / "out"))


def nothing(home: Path) -> None:
    shutil.rmtree(home / "out")
    shutil.rmtree(home / "out.run")


def killed_before_a_checkpoint(home: Path) -> None:
    shutil.rmtree(home / "out")
    for path in (home / "out.run").glob("checkpoint-*"):
        path.rename(home / "out.run" / f".{path.name}.partial-0123456789abcdef")


def killed_in_the_second_checkpoint(home: Path) -> None:
    shutil.rmtree(home / "out")
    newest = max((home / "out.run").glob("checkpoint-*"))
    newest.rename(home / "out.run" / f".{newest.name}.partial-0123456789abcdef")


def stopped(home: Path) -> None:
    shutil.rmtree(home / "out")


def newest_damaged(home: Path) -> None:
    shutil.rmtree(home / "out")
    damage(max((home / "out.run").glob("checkpoint-*")))


def all_damaged(home: Path) -> None:
    shutil.rmtree(home / "out")
    for path in (home / "out.run").glob("checkpoint-*"):
        damage(path)


def damage(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


STATES: dict[str, tuple[Callable[[Path], None], int]] = {
    "nothing": (nothing, 3),
    "killed before a checkpoint": (killed_before_a_checkpoint, 3),
    "killed in a checkpoint": (killed_in_the_second_checkpoint, 2),
    "stopped": (stopped, 1),
    "newest damaged": (newest_damaged, 2),
    "all damaged": (all_damaged, 3),
    "finished": (lambda home: None, 0),
}


def test_what_a_kill_at_the_very_end_left_is_deleted(
    finished: Path, rows: Path, tmp_path: Path
) -> None:
    """The run is finished, so that no later run would sweep it; checkpoints that count stay."""
    token = "0123456789abcdef"
    for kept in (True, False):
        home = shutil.copytree(finished, tmp_path / f"home-{kept}")
        folder = home / "out.run"
        for path in [*folder.glob("checkpoint-*")][int(kept) :]:
            path.rename(folder / f".{path.name}.trash-{token}")
        first = next((path.name for path in folder.glob("checkpoint-*")), "")
        (folder / ".qcore.lock").write_text("{}")
        for name in (f".out.run.trash-{token}", f".out.partial-{token}"):
            (home / name / "checkpoint-2").mkdir(parents=True)
        assert run(rows, home / "out").steps == 3
        left = {path.name for path in home.iterdir()}
        assert left == ({"out", "out.run"} if kept else {"out"})
        assert [*home.rglob(".*")] == []
        assert not kept or (folder / first).is_dir()


def test_a_run_folder_in_use_is_left_alone(finished: Path, rows: Path, tmp_path: Path) -> None:
    home = shutil.copytree(finished, tmp_path / "home")
    for path in [*(home / "out.run").glob("checkpoint-*")]:
        shutil.rmtree(path)
    with Lock(home / "out.run"):
        assert run(rows, home / "out").steps == 3
        assert (home / "out.run" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("state", fast(STATES, "finished", "stopped"))
def test_whatever_the_state_the_same_adapter_is_there_in_the_end(
    finished: Path, rows: Path, tmp_path: Path, state: str
) -> None:
    """The last number of a state is the largest number of steps that are taken again."""
    change, most = STATES[state]
    home = shutil.copytree(finished, tmp_path / "home")
    change(home)
    heard = Heard()
    report = run(rows, home / "out", heard)
    assert len(heard.steps) <= most
    assert raw(home / "out") == raw(finished / "out")
    assert verify(home / "out").ok
    assert (report.output, report.steps) == (home / "out", 3)
    (event,) = heard.all(Finished)
    assert event.result == report.as_json()
    if state == "all damaged":
        assert (home / "out.run-damaged-1" / "checkpoint-2").is_dir()
        assert any("starting again" in line for line in heard.said("warning: "))


def test_the_report_of_a_finished_run_is_that_of_its_end(
    finished: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = shutil.copytree(finished, tmp_path / "home")
    meta = json.loads((home / "out" / "MANIFEST.json").read_text())["meta"]
    line = words(tiny_folder(), rows, home / "out", SETTINGS)
    ended = here(capsys, *line, "--auto-resume", "--json")
    assert ended.code == 0
    assert ended.json["last_loss"] == meta["result"]["last_loss"]
    assert ended.json["coverage"] == meta["coverage"]
    ended = here(capsys, *line, "--auto-resume")
    assert ended.code == 0
    assert f"{home / 'out'}: this run is finished after 3 steps" in ended.err
    ended = here(capsys, *line, "--auto-resume", "--resume")
    assert ended.code == 2
    ended.error("QC-RESUME-010")


def test_what_is_no_finished_run_of_this_command_is_refused(
    finished: Path, rows: Path, tmp_path: Path
) -> None:
    home = shutil.copytree(finished, tmp_path / "home")
    with pytest.raises(InputError) as changed:
        run(rows, home / "out", settings={"learning_rate": 1e-3})
    assert (changed.value.code, changed.value.field) == (
        "QC-RESUME-002", "settings.learning_rate",
    )  # fmt: skip
    damage(home / "out")
    with pytest.raises(InputError) as damaged:
        run(rows, home / "out")
    assert damaged.value.code == "QC-RESUME-011"
    shutil.rmtree(home / "out")
    with Lock(home / "out.run"), pytest.raises(WriteError) as busy:
        run(rows, home / "out")
    assert busy.value.code == "QC-WRITE-010"
    (home / "other").mkdir()
    (home / "other" / "file").touch()
    with pytest.raises(WriteError) as filled:
        run(rows, home / "other")
    assert filled.value.code == "QC-WRITE-001"
    with pytest.raises(UsageError):
        run(rows, home / "out", resume=True)


@pytest.mark.slow
def test_a_loop_that_is_stopped_at_every_step_ends(
    finished: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"save_steps": 0}
    for at in (1, 2):
        stop_at(monkeypatch, at)
        with pytest.raises(Interrupted) as error:
            run(rows, tmp_path / "out", settings=settings)
        assert error.value.fix == "run the same command again"
    stop_at(monkeypatch, 99)
    run(rows, tmp_path / "out", settings=settings)
    assert raw(tmp_path / "out") == raw(finished / "out")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_the_command_is_started_again_until_it_ends_with_0(
    finished: Path, rows: Path, tmp_path: Path, number: int
) -> None:
    """What a service manager does: any end but a refusal starts the command again."""
    line = [*words(tiny_folder(), rows, tmp_path / "out", SETTINGS), "--auto-resume"]
    for at in (1, 2):
        mark = tmp_path / f"mark{at}"
        mark.unlink(missing_ok=True)
        before = partial(held, Loop, "step", mark, at=at, seconds=1)
        process = forked(tmp_path, *line, before=before)
        wait_for(mark, process)
        process.kill(number)
        assert process.status() == (75 if number != signal.SIGKILL else -number)
    for _ in range(2):
        assert forked(tmp_path, *line).status() == 0
        assert raw(tmp_path / "out") == raw(finished / "out")
