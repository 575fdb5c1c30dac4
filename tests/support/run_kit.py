"""Runs of training on the CPU: started here or as a command line, stopped, and what they left."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qcore.config.settings import Settings
from qcore.training.step import Loop
from qcore.training.train import TrainReport, train

#: A run of few seconds: small batches, small adapters, no checkpoints.
SHORT: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "r": 4, "lora_alpha": 8,
    "dtype": "fp32", "save_steps": 0,
}  # fmt: skip
_STEP = Loop.step


def start(
    model: Path, rows: Path, output: Path, settings: Mapping[str, Any], **more: Any
) -> TrainReport:
    """Train; `more` is given to `train`."""
    return train(str(model), rows, output, Settings(**settings), device="cpu", **more)


def words(model: Path, rows: Path, output: Path, settings: Mapping[str, Any]) -> list[object]:
    """The same run as arguments of ``qcore``."""
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    where = ["--model", model, "--data", rows, "--output", output]
    return ["train", *where, "--device", "cpu", *sets]


def stop_at(patch: pytest.MonkeyPatch, at: int, number: int = signal.SIGTERM) -> None:
    """Signal this process as a run's step `at` (from 1) begins; the last call counts."""

    def step(self: Loop, n: int) -> dict[str, Any]:
        if n + 1 == at:
            os.kill(os.getpid(), number)
        return _STEP(self, n)

    patch.setattr(Loop, "step", step)


def raw(folder: Path) -> bytes:
    """The adapter that a run left."""
    return (folder / "adapter_model.safetensors").read_bytes()
