"""What a training run tells: its report, and the lines and records that are made of it.

This file decides what `--json` and the manifest say of a run. `train` decides when.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter.targets import Coverage


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a run did.

    Attributes:
        output: the adapter folder.
        steps: optimizer steps in all.
        first_loss: mean loss per supervised token of the first step.
        last_loss: of the last step.
        eval_loss: of the held-out rows at the end, or ``None``.
        adapter_class: the class that the adapter is written for.
        coverage: what was trained, by group.
        plan: what was planned; bytes, seconds and tokens a second (`plan.beside.RunPlan`).
        measured: what was measured of it, in this process.
    """

    output: Path
    steps: int
    first_loss: float
    last_loss: float
    eval_loss: float | None
    adapter_class: str
    coverage: tuple[Coverage, ...]
    plan: Mapping[str, Any]
    measured: Mapping[str, Any]

    def result(self) -> dict[str, Any]:
        """For the manifest; JSON knows no NaN, which a run resumed after its last step has."""
        losses = {"first_loss": self.first_loss, "last_loss": self.last_loss}
        known = {key: value if math.isfinite(value) else None for key, value in losses.items()}
        plan = {"plan": dict(self.plan), "measured": dict(self.measured)}
        return {"steps": self.steps, **known, "eval_loss": self.eval_loss, **plan}


def first_loss(metrics: Path) -> float:
    """The loss of step 1 of a run that is resumed; NaN of a new one."""
    if not metrics.exists():
        return math.nan
    with metrics.open(encoding="utf-8") as file:
        row = json.loads(file.readline() or "{}")
    return float(row["loss"]) if row.get("step") == 1 else math.nan


def coverage_row(line: Coverage) -> dict[str, Any]:
    """A line of the table of what will be trained."""
    return {
        "group": line.group,
        "modules": line.modules,
        "with LoRA": line.hit,
        "parameters": line.parameters,
        "trained": line.trained,
        "bits": round(line.bits, 2),
    }
