"""The end of a run, and its beginning beside another one: no fault there costs a step."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.e2e_kit import tiny_folder
from support.faults import Faults
from support.run_kit import SHORT, raw, start
from support.sinks import Heard

import qcore.training.train as verb
from qcore.config.settings import Settings
from qcore.errors import InputError, UsageError, WriteError
from qcore.io.artifact import verify
from qcore.training.disk_space import most_checkpoints
from qcore.training.step import Loop

pytestmark = pytest.mark.usefixtures("one_thread")
FOUR: dict[str, Any] = SHORT | {"max_steps": 4, "learning_rate": 5e-3}
_STEP = Loop.step


@pytest.fixture(scope="module")
def whole(rows: Path, once: Callable[..., Path]) -> bytes:
    """The adapter of the uninterrupted run."""
    home = once("whole-of-four", lambda home: start(tiny_folder(), rows, home / "out", FOUR))
    return raw(home / "out")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are computed from now on."""
    computed: list[int] = []

    def step(self: Loop, number: int) -> dict[str, Any]:
        computed.append(number + 1)
        return _STEP(self, number)

    monkeypatch.setattr(Loop, "step", step)
    return computed


def after_preparing(patch: pytest.MonkeyPatch, job: Callable[[], object]) -> None:
    """Do what another run does while this one is prepared and has no lock yet."""
    real = verb.plan_memory

    def plan_memory(*args: Any) -> Any:
        job()
        return real(*args)

    patch.setattr(verb, "plan_memory", plan_memory)


def test_a_file_that_appears_in_the_output_costs_no_step(
    rows: Path, tmp_path: Path, whole: bytes, steps: list[int]
) -> None:
    out, last = tmp_path / "out", tmp_path / "out.run" / "checkpoint-4"

    def fill() -> None:
        out.mkdir()
        (out / "nohup.out").write_text("hello")

    with pytest.raises(WriteError) as error:
        start(tiny_folder(), rows, out, FOUR, reporter=Heard(3, fill).reporter)
    assert (error.value.code, error.value.exit_code) == ("QC-WRITE-001", 73)
    assert str(last) in (error.value.fix or "")
    assert "--resume" in (error.value.fix or "")
    assert verify(last).ok
    assert [path.name for path in out.iterdir()] == ["nohup.out"]
    shutil.move(out / "nohup.out", tmp_path)
    steps.clear()
    start(tiny_folder(), rows, out, FOUR, resume=True)
    assert steps == []
    assert raw(out) == whole
    assert not (tmp_path / "out.run").exists()


@pytest.mark.slow
def test_the_last_checkpoint_makes_no_other_one_go(rows: Path, tmp_path: Path) -> None:
    options = FOUR | {"save_steps": 1, "save_total_limit": 2}
    start(tiny_folder(), rows, tmp_path / "out", options)
    left = sorted(path.name for path in (tmp_path / "out.run").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.slow
def test_a_last_checkpoint_that_cannot_be_written(
    rows: Path, tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter takes a third of its space."""
    full = WriteError("QC-WRITE-003", "the disk is full", file="optimizer.safetensors")

    def save(*_: Any, **__: Any) -> Path:
        raise full

    monkeypatch.setattr("qcore.training.checkpoints.RunFiles.save", save)
    heard = Heard()
    start(tiny_folder(), rows, tmp_path / "out", FOUR, reporter=heard.reporter)
    assert raw(tmp_path / "out") == whole
    assert any("no checkpoint after the last step" in line for line in heard.notes)

    def publish(*_: Any, **__: Any) -> None:
        raise WriteError("QC-WRITE-003", "the disk is full", file="adapter_model.safetensors")

    monkeypatch.setattr("qcore.training.checkpoints.RunFiles.publish", publish)
    with pytest.raises(WriteError, match=r"optimizer\.safetensors"):  # it failed first
        start(tiny_folder(), rows, tmp_path / "other", FOUR)


def test_an_output_that_is_filled_before_the_lock_is_held(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    out = tmp_path / "out"
    after_preparing(monkeypatch, lambda: (out.mkdir(), (out / "x").touch()))
    with pytest.raises(WriteError) as error:
        start(tiny_folder(), rows, out, FOUR)
    assert error.value.code == "QC-WRITE-001"
    assert steps == []
    assert not (tmp_path / "out.run").exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_before_the_lock_is_held(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    left = tmp_path / "out.run" / "checkpoint-2"
    after_preparing(monkeypatch, lambda: left.mkdir(parents=True))
    with pytest.raises(UsageError) as error:
        start(tiny_folder(), rows, tmp_path / "out", FOUR)
    assert error.value.code == "QC-RESUME-003"
    assert steps == []
    assert left.is_dir()


@pytest.fixture(scope="module")
def halted(rows: Path, once: Callable[..., Path]) -> Path:
    """A run of four steps that has only its first two checkpoints, and one that is finished."""

    def write(home: Path) -> None:
        start(tiny_folder(), rows, home / "out", FOUR | {"save_steps": 1, "save_total_limit": 3})
        shutil.move(home / "out", home / "finished")
        shutil.rmtree(home / "out.run" / "checkpoint-3")

    return once("halted-with-two", write)


def resumed(rows: Path, home: Path, **more: Any) -> None:
    options = FOUR | {"save_steps": 1, "save_total_limit": 3}
    start(tiny_folder(), rows, home / "out", options, resume=True, **more)


@pytest.mark.slow
def test_a_run_that_finishes_before_the_lock_is_held(
    rows: Path, halted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    home = shutil.copytree(halted, tmp_path / "home")
    after_preparing(monkeypatch, lambda: shutil.move(home / "finished", home / "out"))
    with pytest.raises(UsageError) as error:
        resumed(rows, home)
    assert error.value.code == "QC-RESUME-005"
    assert steps == []


def test_a_checkpoint_under_the_name_of_another_step(
    rows: Path, halted: Path, tmp_path: Path, whole: bytes
) -> None:
    home = shutil.copytree(halted, tmp_path / "home")
    run = home / "out.run"
    (run / "checkpoint-2").rename(run / "checkpoint-3")
    with pytest.raises(InputError) as error:
        resumed(rows, home)
    assert (error.value.code, error.value.exit_code) == ("QC-RESUME-007", 65)
    assert error.value.fix == "rename it to checkpoint-2"
    (run / "checkpoint-3").rename(run / "checkpoint-2")
    resumed(rows, home)
    assert raw(home / "out") == whole


def test_what_a_kill_left_in_the_run_folder_goes(
    rows: Path, halted: Path, tmp_path: Path, whole: bytes
) -> None:
    home, token = shutil.copytree(halted, tmp_path / "home"), "0123456789abcdef"
    inside = [
        home / "out.run" / f".checkpoint-9.{kind}-{token}" for kind in ("partial", "trash")
    ]  # fmt: skip
    beside = [home / f".out.partial-{token}", home / f".out.run.trash-{token}"]
    for folder in (*inside, *beside):
        folder.mkdir()
        (folder / "x").touch()
    (home / "out.run" / f".metrics.jsonl.partial-{token}").touch()
    resumed(rows, home)
    assert raw(home / "out") == whole
    assert list(home.rglob(".*")) == []


@pytest.mark.slow
def test_metrics_are_durable_before_the_checkpoint_that_claims_them(
    rows: Path, tmp_path: Path
) -> None:
    with Faults() as faults:
        start(tiny_folder(), rows, tmp_path / "out", FOUR | {"save_steps": 1})
    opened: dict[int, Path] = {}
    written: dict[Path, int] = {}
    seen = 0
    for at, (name, args, result) in enumerate(faults.log):
        if name == "open":
            opened[result] = Path(args[0])
        elif name in ("write", "fsync") and opened.get(args[0], Path()).name == "metrics.jsonl":
            written[opened[args[0]]] = at if name == "write" else -1
        elif name == "rename" and Path(args[1]).name.startswith("checkpoint-"):
            assert [*written.values()] == [-1], f"{args[1]} claims rows that are not durable"
            seen += 1
    assert seen == 4


class Full:
    """A disk that is full below a folder from the `at`-th changing call there on.

    Attributes:
        calls: changing calls so far.
        first: path of the first call that failed.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.calls, self.first = 0, Path()
        self._folder, self._at = str(folder), at
        self._opened: dict[int, str] = {}
        for name in ("open", "write", "fsync", "rename", "replace", "mkdir"):
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            path = str(self._opened.get(first, "") if isinstance(first, int) else first)
            reads = name == "open" and not args[0] & (os.O_WRONLY | os.O_RDWR)
            if path.startswith(self._folder) and not reads:
                self.calls += 1
                if self._at is not None and self.calls > self._at:
                    self.first = self.first if self.first.name else Path(path)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = real(first, *args, **kwargs)
            if name == "open":
                self._opened[result] = path
            return result

        return call


@pytest.mark.parametrize("part", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_a_full_disk_names_the_file_that_failed_first(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """What is cleaned up afterwards fails too, and must not be named."""
    options = FOUR | {"max_steps": 2, "save_steps": 1}
    with monkeypatch.context() as patch:
        disk = Full(tmp_path / "0", patch)
        start(tiny_folder(), rows, tmp_path / "0" / "out", options)
    for at in range(disk.calls // part // 2, disk.calls - 5, disk.calls // part):
        home = tmp_path / f"{at}-full"
        home.mkdir()
        with monkeypatch.context() as patch:
            disk = Full(home, patch, at)
            with pytest.raises(WriteError) as error:
                start(tiny_folder(), rows, home / "out", options)
        assert error.value.code == "QC-WRITE-003"
        # A folder that is published is written under a hidden name: the file in it counts. A new
        # folder is durable once its parent is synced.
        named = Path(str(error.value.file))
        assert named.name in str(disk.first) or named.parent == disk.first, (at, str(disk.first))


@pytest.mark.parametrize(
    "options",
    [{"save_steps": 1, "save_total_limit": 2}, {}],
    ids=["two checkpoints", "none"],
)
@pytest.mark.slow
def test_the_disk_space_that_a_run_needs_is_predicted(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Within 10 % of what there is at most, measured whenever a folder gets its name."""
    most, asked, rename = [0], [0], os.rename

    def watched(*args: Any) -> None:
        rename(*args)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        most[0] = max(most[0], sum(path.stat().st_size for path in files))

    def check(path: Path, *, need_bytes: int) -> None:
        asked[0] = need_bytes

    monkeypatch.setattr(os, "rename", watched)
    monkeypatch.setattr("qcore.training.disk_space.check_target", check)
    start(tiny_folder(), rows, tmp_path / "out", FOUR | {"r": 64} | options)
    assert asked[0] == pytest.approx(most[0], rel=0.1)


@pytest.mark.parametrize(
    ("steps", "options", "most"),
    [
        (1000, {}, 4),  # two, that before a spike, and the new one
        (32, {}, 3),  # too short for a spike
        (1000, {"on_spike": "rollback"}, 5),
        (1000, {"on_spike": "rollback", "load_best_at_end": True}, 6),
        (40, {"save_steps": 20}, 2),  # one is due before the last step
        (1000, {"save_steps": 0}, 1),
    ],
)
def test_checkpoints_that_are_kept_beyond_the_limit_count(
    steps: int, options: dict[str, Any], most: int
) -> None:
    settings = Settings(**{"save_steps": 5, "save_total_limit": 2, "eval_steps": 5} | options)
    assert most_checkpoints(settings, steps) == most


def test_a_disk_that_is_too_small_is_named_before_the_base_is_loaded(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    heard = Heard()
    with pytest.raises(WriteError, match="too little free space") as error:
        start(tiny_folder(), rows, tmp_path / "out", FOUR, reporter=heard.reporter)
    assert (error.value.code, error.value.exit_code) == ("QC-WRITE-007", 73)
    assert "save_total_limit (1 checkpoint of" in (error.value.fix or "")
    assert steps == []
    assert not any("loading the base" in str(event) for event in heard.events)
    assert not (tmp_path / "out.run").exists()
