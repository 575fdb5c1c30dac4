"""Spikes of loss and gradient norm: what one is, and what a run does about it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.e2e_kit import write_stock
from support.run_kit import SHORT, raw, start, stop_at
from support.sinks import Heard

from qcore.config.settings import Settings
from qcore.errors import Interrupted, NumericError, UsageError
from qcore.io.artifact import read_manifest
from qcore.training import spikes
from qcore.training.rotation import checkpoints
from qcore.training.spikes import SpikeGuard
from qcore.training.step import Loop, _Sums

pytestmark = pytest.mark.usefixtures("one_thread")
RUN: dict[str, Any] = SHORT | {
    "max_steps": 9, "learning_rate": 5e-3, "quantization": "none", "target_groups": ("attn",),
    "save_steps": 2, "save_total_limit": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(once: Callable[..., Path]) -> Path:
    return once("best-base", lambda folder: write_stock(folder, "vl", dtype=torch.bfloat16))


@pytest.fixture
def spiking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[int, float]], None]:
    """Multiply the losses of steps, from 1; a spike needs only 3 steps before it."""

    def script(factors: Mapping[int, float]) -> None:
        accumulate, step = Loop._accumulate, Loop.step

        def numbered(self: Loop, number: int) -> dict[str, Any]:
            self.at = number + 1  # type: ignore[attr-defined]
            return step(self, number)

        def changed(self: Loop, batches: Any) -> _Sums:
            found = accumulate(self, batches)
            factor = factors.get(self.at, 1.0)  # type: ignore[attr-defined]
            return found._replace(loss=found.loss * factor)

        monkeypatch.setattr(spikes, "LEAST", 3)
        monkeypatch.setattr(Loop, "step", numbered)
        monkeypatch.setattr(Loop, "_accumulate", changed)

    return script


def steps(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints(folder)]


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_second", "memory_gb")
    return [{key: value for key, value in row.items() if key not in clocks} for row in rows]


# -- what a spike is


def judged(values: list[tuple[float, float]]) -> list[int]:
    """Which of these steps are spikes."""
    guard, found = SpikeGuard(), []
    for number, (loss, norm) in enumerate(values):
        spike = guard.judge(loss, norm)
        guard.add(loss, norm, spike)
        if spike is not None:
            found.append(number)
    return found


def curve(seed: int, steps: int = 300, rare: float = 0.0) -> list[tuple[float, float]]:
    """Losses that fall and then stay, with the noise of rows; `rare` steps have 3 times as much."""
    rng = random.Random(seed)
    values = []
    for number in range(steps):
        more = 3.0 if rng.random() < rare else 1.0
        loss = (0.9 + 1.1 * math.exp(-number / 80)) * math.exp(rng.gauss(0, 0.2)) * more
        values.append((loss, 0.5 * math.exp(rng.gauss(0, 0.35)) * (1 + 5 * math.exp(-number / 10))))
    return values


def test_clean_runs_have_none() -> None:
    assert [seed for seed in range(20) if judged(curve(seed))] == []
    assert [seed for seed in range(20) if judged(curve(seed, rare=0.1))] == []


@pytest.mark.parametrize("which", [0, 1])
def test_ten_times_the_loss_or_the_norm_is_one(which: int) -> None:
    for seed in range(20):
        values = curve(seed)
        loss, norm = values[200]
        values[200] = (10 * loss, norm) if which == 0 else (loss, 30 * norm)
        assert judged(values) == [200]


def test_a_low_value_and_the_first_steps_are_none() -> None:
    values = curve(1)
    values[200] = (values[200][0] / 20, values[200][1] / 20)
    values[5] = (50.0, 50.0)
    assert judged(values) == []


def test_equal_losses_and_zero_have_a_score() -> None:
    assert judged([(1.0, 1.0)] * 40 + [(1.01, 1.0)]) == []
    assert judged([(1.0, 1.0)] * 40 + [(2.0, 1.0)]) == [40]
    assert judged([(0.0, 0.0)] * 40 + [(1e-4, 1e-4)]) == []


def test_the_score_is_that_of_the_book() -> None:
    """Iglewicz and Hoaglin: 0.6745 (x - median) / MAD, here by hand."""
    guard = SpikeGuard()
    for number in range(33):
        guard.add(math.exp(number / 10), 1.0, None)
    spike = guard.judge(math.exp(20.0), 1.0)
    assert spike is not None
    assert spike.loss_z == pytest.approx(0.6745 * (20.0 - 1.6) / 0.8)
    assert spike.loss_median == pytest.approx(math.exp(1.6))


def test_the_state_comes_back_exactly_from_json() -> None:
    values = curve(3)
    values[120] = (values[120][0] * 20, values[120][1])
    whole = SpikeGuard(newest=100)
    for loss, norm in values[:150]:
        whole.add(loss, norm, whole.judge(loss, norm))
    again = SpikeGuard()
    again.restore(json.loads(json.dumps(whole.as_json())))
    again.newest = whole.newest
    for loss, norm in values[150:]:
        assert whole.judge(loss, norm) == again.judge(loss, norm)
        whole.add(loss, norm, None)
        again.add(loss, norm, None)
    assert whole == again


def test_the_checkpoint_before_a_spike_is_kept_until_it_is_over() -> None:
    guard = SpikeGuard()
    for _ in range(40):
        guard.add(1.0, 1.0, None)
    guard.newest = 40
    guard.add(9.0, 1.0, guard.judge(9.0, 1.0))
    assert guard.good == 40
    guard.newest = 50
    for _ in range(30):  # as high: no further spikes, and not over
        guard.add(8.0, 1.0, guard.judge(8.0, 1.0))
    assert guard.good == 40
    for _ in range(spikes.CALM):
        guard.add(1.0, 1.0, None)
    assert guard.good is None


# -- what a run does


def test_warn_names_the_rows_and_keeps_the_last_good_checkpoint(
    base: Path, rows: Path, tmp_path: Path, spiking: Callable[..., None]
) -> None:
    spiking({5: 50.0})
    heard = Heard()
    start(base, rows, tmp_path / "out", RUN | {"save_steps": 2}, reporter=heard.reporter)
    (line,) = [text for text in heard.notes if "rose abruptly" in text]
    assert line.startswith("warning: ")
    assert "step 5: " in line
    assert f"{rows}: lines " in line
    assert "checkpoint-4 is kept" in line
    assert 4 in steps(tmp_path / "out.run")  # with save_total_limit 1
    (row,) = [row for row in metrics(tmp_path / "out") if "spike" in row]
    assert row["step"] == 5
    assert row["spike"]["loss_z"] > 6
    assert row["spike"]["rows"].startswith(f"{rows}: lines ")


@pytest.mark.slow
def test_stop_updates_nothing_and_can_be_resumed_with_warn(
    base: Path, rows: Path, tmp_path: Path, spiking: Callable[..., None]
) -> None:
    spiking({5: 50.0})
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN | {"on_spike": "stop"})
    assert (error.value.code, error.value.exit_code) == ("QC-TRAIN-017", 76)
    assert error.value.file == str(rows)
    assert str(error.value.field).startswith("lines ")
    assert "checkpoint-4 is intact (verified now)" in str(error.value.fix)
    assert not (tmp_path / "out").exists()
    heard = Heard()
    start(base, rows, tmp_path / "out", RUN, resume=True, reporter=heard.reporter)
    assert any("on_spike is warn now and was stop" in text for text in heard.notes)
    start(base, rows, tmp_path / "whole", RUN)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")


def test_rollback_undoes_the_updates_since_the_checkpoint(
    base: Path, rows: Path, tmp_path: Path, spiking: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spiking({6: 50.0})
    states: dict[int, list[torch.Tensor]] = {}
    step = Loop.step

    def recorded(self: Loop, number: int) -> dict[str, Any]:
        states[number] = [p.detach().clone() for p in self.parameters]
        return step(self, number)

    monkeypatch.setattr(Loop, "step", recorded)
    heard = Heard()
    more = {"on_spike": "rollback"}
    start(base, rows, tmp_path / "out", RUN | more, reporter=heard.reporter)
    (line,) = [text for text in heard.notes if "rose abruptly" in text]
    assert "returned to checkpoint-4: the updates of steps 5 to 6 are undone" in line
    for before, after in zip(states[4], states[6], strict=True):
        assert torch.equal(before, after)  # step 7 starts where step 5 did
    assert any(not torch.equal(a, b) for a, b in zip(states[5], states[6], strict=True))
    result = read_manifest(tmp_path / "out").meta["result"]
    assert result["undone_steps"] == [[5, 6]]
    assert [row["step"] for row in metrics(tmp_path / "out")] == list(range(1, 10))


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 3, 5, 6, 7, 8])
def test_a_run_with_a_rollback_resumes_to_the_same_bytes(
    base: Path, rows: Path, tmp_path: Path, spiking: Callable[..., None], at: int
) -> None:
    """Stopped before the spike, at it, between the rollback and the next checkpoint, and after."""
    spiking({6: 50.0, 8: 60.0})
    settings = RUN | {"on_spike": "rollback"}
    start(base, rows, tmp_path / "whole", settings)
    with pytest.MonkeyPatch.context() as patch:
        stop_at_numbered(patch, at)
        with pytest.raises(Interrupted):
            start(base, rows, tmp_path / "out", settings)
    start(base, rows, tmp_path / "out", settings, resume=True)
    assert raw(tmp_path / "out") == raw(tmp_path / "whole")
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    results = [read_manifest(tmp_path / n).meta["result"]["undone_steps"] for n in ("out", "whole")]
    assert results[0] == results[1] == [[5, 6], [7, 8]]


def stop_at_numbered(patch: pytest.MonkeyPatch, at: int) -> None:
    """`stop_at` beside the script of losses."""
    step = Loop.step
    stop_at(patch, at)
    signalling = Loop.step

    def both(self: Loop, number: int) -> dict[str, Any]:
        self.at = number + 1  # type: ignore[attr-defined]
        return signalling(self, number)

    assert step is not signalling
    patch.setattr(Loop, "step", both)


def test_rollback_without_a_checkpoint_stops(
    base: Path, rows: Path, tmp_path: Path, spiking: Callable[..., None]
) -> None:
    spiking({4: 50.0})
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN | {"on_spike": "rollback", "save_steps": 5})
    assert error.value.code == "QC-TRAIN-017"
    assert "before the first checkpoint" in str(error.value)


def test_rollback_to_one_checkpoint_ends(
    base: Path, rows: Path, tmp_path: Path, spiking: Callable[..., None]
) -> None:
    spiking({5: 50.0, 6: 60.0, 7: 70.0, 8: 80.0})
    more = {"on_spike": "rollback", "save_steps": 4}
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN | more)
    assert error.value.code == "QC-TRAIN-017"
    assert "after 2 returns to checkpoint-4" in str(error.value)
    assert "checkpoint-4 is intact" in str(error.value.fix)


def test_rollback_needs_checkpoints() -> None:
    with pytest.raises(UsageError) as error:
        Settings(on_spike="rollback", save_steps=0)
    assert (error.value.code, error.value.field) == ("QC-CONFIG-007", "on_spike")
