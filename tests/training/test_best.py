"""The best evaluation: named, kept, published on demand, also across a resume."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.e2e_kit import write_stock
from support.run_kit import SHORT, raw, start, stop_at
from support.sinks import Heard

from qcore.config.resolve import parse_sets
from qcore.errors import InputError, Interrupted, NumericError, UsageError
from qcore.io.artifact import publish, read_manifest
from qcore.training.best import BestSoFar, Evaluated
from qcore.training.checkpoints import RunFiles
from qcore.training.rotation import checkpoints
from qcore.training.step import Loop
from qcore.training.train import TrainReport

pytestmark = pytest.mark.usefixtures("one_thread")
RUN: dict[str, Any] = SHORT | {
    "max_steps": 4, "learning_rate": 5e-3, "quantization": "none", "target_groups": ("attn",),
    "eval_fraction": 0.25, "eval_steps": 1, "load_best_at_end": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(once: Callable[..., Path]) -> Path:
    return once("best-base", lambda folder: write_stock(folder, "vl", dtype=torch.bfloat16))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Of the evaluations after steps 1, 2, ... of a run, whichever process makes them."""

    def script(values: Sequence[float]) -> None:
        step = Loop.step

        def counted(self: Loop, number: int) -> dict[str, Any]:
            self.done = number + 1  # type: ignore[attr-defined]
            return step(self, number)

        monkeypatch.setattr(Loop, "step", counted)
        monkeypatch.setattr(Loop, "evaluate", lambda self, *_: values[self.done - 1])

    return script


def run(base: Path, rows: Path, output: Path, *, heard: Heard | None = None, **more: Any) -> Any:
    resume = bool(more.pop("resume", False))
    reporter = None if heard is None else heard.reporter
    report: TrainReport = start(
        base, rows, output, RUN | more, resume=resume, reporter=reporter
    )  # fmt: skip
    return report


def steps(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints(folder)]


# -- which one is the best


def test_the_lowest_finite_and_the_first_of_equal_ones() -> None:
    found = BestSoFar()
    said = [found.see(n, x) for n, x in enumerate((None, math.nan, 3.0, 3.0, -math.inf, 2.0, 4.0))]
    assert said == [False, False, True, False, False, True, False]
    assert found.best == Evaluated(step=5, eval_loss=2.0)


def test_it_needs_evaluations(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        run(base, rows, tmp_path / "out", eval_fraction=0.0, eval_steps=0)
    assert (error.value.code, error.value.field) == ("QC-CONFIG-007", "load_best_at_end")
    assert list(tmp_path.iterdir()) == []


def test_the_name_in_transformers_is_suggested() -> None:
    with pytest.raises(UsageError, match="unknown setting") as error:
        parse_sets(["load_best_model_at_end=true"])
    assert "did you mean load_best_at_end?" in str(error.value.fix)


# -- what is published


def test_the_best_checkpoint_is_published(
    base: Path, rows: Path, tmp_path: Path, losses: Callable[..., None]
) -> None:
    losses([3.0, 1.5, 2.0, 1.75])
    heard = Heard()
    report = run(base, rows, tmp_path / "out", heard=heard)
    assert steps(tmp_path / "out.run") == [1, 2]  # of the best so far, without save_steps
    assert raw(tmp_path / "out") == raw(tmp_path / "out.run" / "checkpoint-2")
    assert raw(tmp_path / "out") != raw(tmp_path / "out.run" / "checkpoint-1")
    best = {"step": 2, "eval_loss": 1.5}
    assert (report.best_evaluation, report.published_step, report.steps) == (best, 2, 4)
    assert report.eval_loss == 1.75
    result = read_manifest(tmp_path / "out").meta["result"]
    assert (result["best_evaluation"], result["published_step"]) == (best, 2)
    assert heard.said("lowest eval_loss 1.5000 after step 2 of 4: checkpoint-2 is published")
    logged = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("eval_loss") for line in logged] == [3.0, 1.5, 2.0, None, 1.75]


@pytest.mark.slow
def test_the_last_step_is_the_best(
    base: Path, rows: Path, tmp_path: Path, losses: Callable[..., None]
) -> None:
    losses([3.0, 1.5, 2.0, 1.25])
    report = run(base, rows, tmp_path / "out")
    assert (report.best_evaluation, report.published_step) == ({"step": 4, "eval_loss": 1.25}, 4)
    assert raw(tmp_path / "out") != raw(tmp_path / "out.run" / "checkpoint-2")


def test_without_the_setting_it_is_named_and_kept(
    base: Path, rows: Path, tmp_path: Path, losses: Callable[..., None]
) -> None:
    losses([1.5, 2.0, 3.0, 2.5])
    heard = Heard()
    report = run(
        base, rows, tmp_path / "out", heard=heard, load_best_at_end=False, save_steps=1,
        save_total_limit=1,
    )  # fmt: skip
    assert (report.best_evaluation, report.published_step) == ({"step": 1, "eval_loss": 1.5}, 4)
    assert steps(tmp_path / "out.run") == [1, 3]
    assert raw(tmp_path / "out") != raw(tmp_path / "out.run" / "checkpoint-1")
    said = heard.said("lowest eval_loss 1.5000 after step 1 of 4; the last step is published")
    assert "checkpoint-1" in said[0]


@pytest.mark.slow
def test_other_bytes_than_the_checkpoints_are_refused(
    base: Path, rows: Path, tmp_path: Path, losses: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    losses([1.5, 2.0])
    monkeypatch.setattr(RunFiles, "_load_weights", lambda self, path: None)
    with pytest.raises(NumericError) as error:
        run(base, rows, tmp_path / "out", max_steps=2)
    assert error.value.code == "QC-TRAIN-013"
    assert not (tmp_path / "out").exists()


# -- kept, and across a resume


@pytest.mark.parametrize(
    ("step", "best", "left"), [(300, 100, [100, 300]), (300, 200, [200, 300]), (300, 300, [300])]
)
def test_rotation_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, best: int, left: list[int]
) -> None:
    for number in (100, 200):
        with publish(tmp_path / f"checkpoint-{number}", kind="checkpoint") as out:
            out.write_text("state", str(number))
    monkeypatch.setattr(RunFiles, "_adapter", lambda self, out: out.write_text("adapter", "x"))
    settings: Any = SimpleNamespace(save_total_limit=1)
    model: Any = SimpleNamespace(trainable=list)
    nothing: Any = None
    files = RunFiles(
        run=SimpleNamespace(settings=settings), model=model, namespace=nothing,  # type: ignore[arg-type]
        digests={}, coverage=[],
    )  # fmt: skip
    optimizer: Any = SimpleNamespace(state={})
    path = files.save(tmp_path, step, optimizer, Evaluated(step=best, eval_loss=0.5))
    assert steps(tmp_path) == left
    assert read_manifest(path).meta["best_evaluation"] == {"step": best, "eval_loss": 0.5}


@pytest.mark.slow
def test_a_resumed_run_publishes_the_same(
    base: Path, rows: Path, tmp_path: Path, losses: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    losses([3.0, 1.5, 2.0, 1.75])
    more: dict[str, Any] = {"save_total_limit": 1}
    whole = run(base, rows, tmp_path / "whole", **more)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        patch.setattr(Loop, "evaluate", lambda self, *_: [3.0, 1.5, 2.0][self.scripted.pop(0)])
        patch.setattr(Loop, "scripted", [0, 1, 2], raising=False)
        with pytest.raises(Interrupted):
            run(base, rows, tmp_path / "out", **more)
    assert steps(tmp_path / "out.run") == [2, 3]
    monkeypatch.setattr(Loop, "done", 3, raising=False)  # resuming begins with an evaluation
    damaged = shutil.copytree(tmp_path / "out.run", tmp_path / "damaged.run")
    shutil.rmtree(damaged / "checkpoint-2")
    with pytest.raises(InputError) as error:
        run(base, rows, tmp_path / "damaged", resume=True, **more)
    assert error.value.code == "QC-RESUME-006"
    again = run(base, rows, tmp_path / "out", resume=True, **more)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")
    assert again.best_evaluation == whole.best_evaluation == {"step": 2, "eval_loss": 1.5}
