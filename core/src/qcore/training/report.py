"""`TrainReport`: what ``qcore train --json`` and the adapter's manifest say of a finished run.

This file decides what ``--json`` and the manifest say about a run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..adapter.targets import Coverage


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """The result of `train`.

    Attributes:
        output: the adapter folder.
        steps: optimizer steps of the whole run.
        first_loss: mean loss per supervised token of the first step.
        last_loss: of the last step; NaN where a resumed run had no step left.
        eval_loss: of the held-out rows at the end; ``None`` where none are held out.
        best_evaluation: step and eval_loss of the lowest finite evaluation; ``None`` without any.
        published_step: the step whose adapter is published.
        adapter_class: the class that the adapter is written for.
        coverage: what was trained, by group.
        plan: bytes, seconds and tokens per second that were planned (`RunPlan.as_json`).
        measured: the same as measured, in this process (`Measured.as_json`).
    """

    output: Path
    steps: int
    first_loss: float
    last_loss: float
    eval_loss: float | None
    best_evaluation: Mapping[str, Any] | None
    published_step: int
    adapter_class: str
    coverage: tuple[Coverage, ...]
    plan: Mapping[str, Any]
    measured: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore train --json``."""
        return {**asdict(self), "output": str(self.output)}

    def result(self) -> dict[str, Any]:
        """For the manifest, where NaN becomes null."""
        losses = {"first_loss": self.first_loss, "last_loss": self.last_loss}
        known = {key: value if math.isfinite(value) else None for key, value in losses.items()}
        plan = {"plan": dict(self.plan), "measured": dict(self.measured)}
        best = {
            "best_evaluation": self.best_evaluation, "published_step": self.published_step,
        }  # fmt: skip
        return {"steps": self.steps, **known, "eval_loss": self.eval_loss, **best, **plan}


def first_loss(metrics: Path) -> float:
    """The loss of step 1 of a resumed run; NaN for a new run."""
    if not metrics.exists():
        return math.nan
    with metrics.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            if "step" in row:  # else a note
                return float(row["loss"]) if row["step"] == 1 else math.nan
    return math.nan


def last_loss(metrics: Path) -> float:
    """The loss of the last step of a run that is resumed after it; NaN without any."""
    last = math.nan
    if metrics.exists():
        with metrics.open(encoding="utf-8") as file:
            for line in file:
                last = float(json.loads(line).get("loss", last))
    return last


def coverage_row(line: Coverage) -> dict[str, Any]:
    """A row of the table "what will be trained"."""
    return {
        "group": line.group,
        "modules": line.modules,
        "with LoRA": line.hit,
        "parameters": line.parameters,
        "trained": line.trained,
        "bits": round(line.bits, 2),
    }
