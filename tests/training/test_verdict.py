"""A run that gained nothing is not published, and its adapter can be looked at."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.e2e_kit import write_stock
from support.run_kit import SHORT, raw, start
from support.sinks import Heard

from qcore.errors import NumericError
from qcore.io.artifact import read_manifest, verify
from qcore.training.step import Loop, _Sums
from qcore.training.verdict import loss_without_gain

pytestmark = pytest.mark.usefixtures("one_thread")
RUN: dict[str, Any] = SHORT | {
    "max_steps": 4, "learning_rate": 5e-3, "quantization": "none", "target_groups": ("attn",),
}  # fmt: skip
VOCABULARY = 1000


@pytest.fixture(scope="module")
def base(once: Callable[..., Path]) -> Path:
    return once("best-base", lambda folder: write_stock(folder, "vl", dtype=torch.bfloat16))


def noisy(level: float, count: int, seed: int, noise: float = 0.3) -> list[float]:
    rng = random.Random(seed)
    return [level * math.exp(rng.gauss(0, noise)) for _ in range(count)]


def test_losses_that_fall_or_stay_are_a_gain() -> None:
    """Also those of few steps, each on other rows, and those that a model knows already."""
    for seed in range(100):
        for start_, end in ((2.0, 1.0), (2.0, 1.9), (1.0, 1.0), (0.02, 0.02)):
            for steps in (2, 6, 40, 400):
                first, last = (
                    noisy(start_, min(16, steps), seed),
                    noisy(end, min(128, steps), -seed),
                )
                assert loss_without_gain(first, last, steps, VOCABULARY) == ""
    assert loss_without_gain([], [], 1, VOCABULARY) == ""
    assert loss_without_gain([6.0], [6.0], 1, VOCABULARY) == ""


@pytest.mark.parametrize("steps", [2, 6, 40, 400])
def test_a_loss_that_rose_is_none(steps: int) -> None:
    for seed in range(50):
        first, last = (
            noisy(1.0, min(16, steps), seed, 0.1),
            noisy(10.0, min(128, steps), -seed, 0.1),
        )
        words = loss_without_gain(first, last, steps, VOCABULARY)
        assert "ended at a loss of" in words
        assert "began at" in words


def test_the_loss_of_chance_is_none_after_enough_steps() -> None:
    chance = math.log(VOCABULARY)
    losses = noisy(chance, 64, 1, 0.001)
    assert f"ln({VOCABULARY})" in loss_without_gain(losses[:16], losses, 64, VOCABULARY)
    assert loss_without_gain(losses[:8], losses[:16], 16, VOCABULARY) == ""
    below = noisy(0.9 * chance, 64, 1, 0.001)
    assert loss_without_gain(losses[:16], below, 64, VOCABULARY) == ""


def rising(patch: pytest.MonkeyPatch) -> None:
    """Each step has 3 times the loss of the step before it."""
    accumulate = Loop._accumulate

    def changed(self: Loop, batches: Any) -> _Sums:
        self.factor = 3 * getattr(self, "factor", 1 / 3)  # type: ignore[attr-defined]
        found = accumulate(self, batches)
        return found._replace(loss=found.loss * self.factor)  # type: ignore[attr-defined]

    patch.setattr(Loop, "_accumulate", changed)


@pytest.mark.slow
def test_a_run_that_rose_keeps_its_adapter_and_is_published_on_demand(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(base, rows, tmp_path / "plain", RUN)
    rising(monkeypatch)
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN)
    assert (error.value.code, error.value.exit_code) == ("QC-TRAIN-018", 76)
    kept = tmp_path / "out.run" / "checkpoint-4"
    assert error.value.file == str(kept)
    assert verify(kept).ok
    assert raw(kept) == raw(tmp_path / "plain")
    assert not (tmp_path / "out").exists()

    heard = Heard()
    start(
        base, rows, tmp_path / "out", RUN | {"publish_without_gain": True}, resume=True,
        reporter=heard.reporter,
    )  # fmt: skip
    assert raw(tmp_path / "out") == raw(tmp_path / "plain")
    assert "ended at a loss" in read_manifest(tmp_path / "out").meta["result"]["without_gain"]
    assert any("published because of publish_without_gain" in text for text in heard.notes)


def test_an_adapter_below_rounding_is_not_published(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericError) as error:
        start(base, rows, tmp_path / "out", RUN | {"learning_rate": 1e-12})
    assert error.value.code == "QC-TRAIN-018"
    assert "too small to change a weight" in str(error.value)
    assert verify(tmp_path / "out.run" / "checkpoint-4").ok
    start(base, rows, tmp_path / "small", RUN | {"learning_rate": 1e-4, "max_steps": 1})
