"""The best evaluation of a run, and whether its checkpoint is published.

This file decides which evaluation is the best (the lowest finite ``eval_loss``, the earliest of
equal ones) and that ``load_best_at_end`` needs evaluations. `train` writes the checkpoints,
`checkpoints` keeps and restores them.

Code: ``QC-CONFIG-007`` ``load_best_at_end`` without held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """An evaluation.

    Attributes:
        step: optimizer steps that are done.
        eval_loss: mean loss per supervised token of the held-out rows.
    """

    step: int
    eval_loss: float

    def as_json(self) -> dict[str, Any]:
        """For manifests and ``--json``."""
        return {"step": self.step, "eval_loss": self.eval_loss}


class BestSoFar:
    """Keeps the best evaluation of a run.

    Attributes:
        best: the best evaluation; ``None`` before the first finite one.
    """

    def __init__(self) -> None:
        self.best: Evaluated | None = None

    def see(self, step: int, eval_loss: float | None) -> bool:
        """Take an evaluation into account; returns whether it is the best so far.

        Args:
            step: optimizer steps that are done.
            eval_loss: ``None``: nothing was evaluated.
        """
        if eval_loss is None or not math.isfinite(eval_loss):
            return False
        if self.best is not None and eval_loss >= self.best.eval_loss:
            return False
        self.best = Evaluated(step=step, eval_loss=eval_loss)
        return True

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Go on from what the manifest of a checkpoint records."""
        record = meta.get("best_evaluation")
        if record is not None:
            self.best = Evaluated(step=record["step"], eval_loss=record["eval_loss"])


def check_evaluates(load_best_at_end: bool, held_out: int) -> None:
    """Refuse ``load_best_at_end`` for a run that evaluates nothing.

    Args:
        load_best_at_end: the setting.
        held_out: number of rows to evaluate.

    Raises:
        UsageError: ``QC-CONFIG-007``.
    """
    if load_best_at_end and not held_out:
        raise UsageError(
            "QC-CONFIG-007",
            "needs held-out rows, but none are held out",
            field="load_best_at_end",
            found="true with eval_fraction 0",
            fix="set eval_fraction, pass --eval-data, or leave load_best_at_end out",
        )
