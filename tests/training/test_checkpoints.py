"""A run's folder: whose it is, what resuming finds in it, what rotation leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcore.errors import InputError, UsageError, WriteError
from qcore.io.artifact import publish
from qcore.training.checkpoints import RunFiles
from qcore.training.rotation import checkpoints
from qcore.training.run_folder import locked, newest, run_folder


def _checkpoint(folder: Path, step: int, *, damaged: bool = False) -> Path:
    path = folder / f"checkpoint-{step}"
    with publish(path, kind="checkpoint") as out:
        out.write_text("state", str(step))
        out.meta["step"] = step
    if damaged:
        (path / "state").write_text("x" * len(str(step)))
    return path


def test_nobody_is_told_to_delete_a_run_that_goes_on(tmp_path: Path) -> None:
    output, folder = tmp_path / "out", tmp_path / "out.run"
    with locked(folder):
        _checkpoint(folder, 1)
        with pytest.raises(WriteError) as caught:
            run_folder(output, resume=False)
        assert caught.value.code == "QC-WRITE-010"
    with pytest.raises(UsageError) as left:
        run_folder(output, resume=False)
    assert left.value.code == "QC-RESUME-003"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]


def test_a_second_run_leaves_the_first_ones_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "out.run"
    with locked(folder):
        (folder / "metrics.jsonl").write_text("{}\n")
        with pytest.raises(WriteError), locked(folder):
            pass
        assert (folder / "metrics.jsonl").read_text() == "{}\n"
    assert not folder.exists()


def test_a_run_that_leaves_a_checkpoint_keeps_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out.run"
    with locked(folder):
        _checkpoint(folder, 3)
    assert [step for step, _ in checkpoints(folder)] == [3]


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    good = _checkpoint(tmp_path, 10)
    _checkpoint(tmp_path, 20, damaged=True)
    found, told = newest(tmp_path)
    assert found == (10, good)
    assert len(told) == 1
    assert "checkpoint-20" in told[0]


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 10, damaged=True)
    with pytest.raises(InputError) as caught:
        newest(tmp_path)
    assert caught.value.code == "QC-RESUME-004"


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("there", "step", "keep", "left"),
    [
        ([100, 200], 300, 2, [200, 300]),
        ([100], 200, 2, [100, 200]),
        # 200 was damaged, the run went on from 100: it must not push out what was just written.
        ([100, 200], 150, 1, [150]),
        ([100, 200], 150, 2, [100, 150]),
    ],
)
def test_rotation_never_deletes_what_was_just_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[int], step: int, keep: int,
    left: list[int],
) -> None:  # fmt: skip
    for number in there:
        _checkpoint(tmp_path, number)
    monkeypatch.setattr(RunFiles, "_adapter", lambda self, out: out.write_text("adapter", "x"))
    run: Any = SimpleNamespace(settings=SimpleNamespace(save_total_limit=keep))
    model: Any = SimpleNamespace(trainable=lambda: [])
    anything: Any = None
    files = RunFiles(run=run, model=model, namespace=anything, digests={}, coverage=[])
    files.save(tmp_path, step, SimpleNamespace(state={}))  # type: ignore[arg-type]
    assert [number for number, _ in checkpoints(tmp_path)] == left
