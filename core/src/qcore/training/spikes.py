"""Spikes of the loss or the gradient norm: which steps are far outside the steps before them.

A value is a spike if its modified z-score, ``0.6745 (x - median) / MAD`` (Iglewicz and Hoaglin,
"How to Detect and Handle Outliers", 1993, section 3.3; NIST/SEMATECH e-Handbook, 1.3.5.17), over
the last 128 steps exceeds 6, and it is at least 1.5 times the largest of them. Scores are those of
logarithms: losses and norms of steps are skewed. Window and bound are those of OLMo-core's
`SkipStepOptimizer`, which uses mean and standard deviation; median and MAD do not follow a spike
that is in the window. The second condition keeps data with two kinds of rows from spiking at
each step with the rarer kind.

This file decides what a spike is and which checkpoint is the last good one. `step` judges each
step before its update; `rollback` acts on it as ``on_spike`` says.

Resuming is exact: the state is a part of every checkpoint (`as_json`), and floats pass through
JSON unchanged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

WINDOW: Final = 128  #: steps that a step is compared with
LEAST: Final = 32  #: steps before the first judgement
BOUND: Final = 6.0  #: modified z-score of a spike
CALM: Final = 16  #: steps below the level of a spike after which it is over
FIRST: Final = 16  #: losses at the start of the run that are kept for its end
ABOVE: Final = 1.5  #: times the largest value of the window that a spike has at least
_LEAST_VALUE: Final = 1e-3  # losses below it are equal: nothing is left to lose
_LEAST_DEVIATION: Final = 0.05
_NORMAL: Final = 0.6745  # MAD of a normal distribution with deviation 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """A step whose loss or gradient norm is far outside the steps before it.

    Attributes:
        loss: of the step.
        grad_norm: of the step.
        loss_z: modified z-score of the logarithm of the loss.
        grad_norm_z: the same of the gradient norm.
        loss_median: of the steps before.
        grad_norm_median: of the steps before.
    """

    loss: float
    grad_norm: float
    loss_z: float
    grad_norm_z: float
    loss_median: float
    grad_norm_median: float

    @property
    def found(self) -> str:
        """Values with their medians and scores."""
        return (
            f"loss {self.loss:.4g} (median {self.loss_median:.4g}, z {self.loss_z:.1f}), "
            f"gradient norm {self.grad_norm:.4g} (median {self.grad_norm_median:.4g}, "
            f"z {self.grad_norm_z:.1f})"
        )

    def as_json(self) -> dict[str, float]:
        """For ``metrics.jsonl``."""
        return {
            "loss_z": round(self.loss_z, 2),
            "grad_norm_z": round(self.grad_norm_z, 2),
            "loss_median": self.loss_median,
            "grad_norm_median": self.grad_norm_median,
        }


@dataclass(slots=True)
class SpikeGuard:
    """Judges steps one after another.

    Attributes:
        first: losses of the first steps of the run.
        losses: of the last steps.
        norms: gradient norms of the last steps.
        good: step of the newest checkpoint before a spike that is not over; ``None``: no spike.
        undone: ranges of steps, first and last, whose updates a rollback removed.
        newest: step of the newest checkpoint; ``None`` before the first. Not a part of the state.
    """

    first: list[float] = field(default_factory=list)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    good: int | None = None
    undone: list[tuple[int, int]] = field(default_factory=list)
    newest: int | None = None
    _level: float = math.inf
    _calm: int = 0

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """Whether a step is a spike; both values must be finite."""
        if len(self.losses) < LEAST:
            return None
        loss_median, loss_z = _score(self.losses, loss)
        norm_median, norm_z = _score(self.norms, grad_norm)
        high = loss_z > BOUND and loss > ABOVE * max(self.losses)
        steep = norm_z > BOUND and grad_norm > ABOVE * max(self.norms)
        if not (high or steep):
            return None
        return Spike(
            loss=loss, grad_norm=grad_norm, loss_z=loss_z, grad_norm_z=norm_z,
            loss_median=loss_median, grad_norm_median=norm_median,
        )  # fmt: skip

    def add(self, loss: float, grad_norm: float, spike: Spike | None) -> None:
        """Add a step whose update stays.

        Args:
            loss: of the step.
            grad_norm: of the step.
            spike: what `judge` returned.
        """
        if len(self.first) < FIRST:
            self.first.append(loss)
        if spike is not None and self.good is None and self.newest is not None:
            self.good = self.newest
            self._level = max(self.losses)
        self._calm = self._calm + 1 if spike is None and loss <= self._level else 0
        if self._calm >= CALM:
            self.good, self._level = None, math.inf
        self.losses.append(loss)
        self.norms.append(grad_norm)

    def as_json(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        return {
            "first": self.first,
            "losses": list(self.losses),
            "norms": list(self.norms),
            "good": self.good,
            "undone": [list(steps) for steps in self.undone],
            "level": None if math.isinf(self._level) else self._level,
            "calm": self._calm,
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue from the state in a checkpoint; without one, as a new run does.

        What rollbacks removed stays known: a checkpoint from before one does not list it.
        """
        state = state or {}
        self.first = list(state.get("first", ()))
        self.losses = deque(state.get("losses", ()), maxlen=WINDOW)
        self.norms = deque(state.get("norms", ()), maxlen=WINDOW)
        self.good = state.get("good")
        undone = [tuple(steps) for steps in state.get("undone", ())]
        self.undone += [steps for steps in undone if steps not in self.undone]
        level = state.get("level")
        self._level = math.inf if level is None else level
        self._calm = state.get("calm", 0)


def _score(window: Sequence[float], value: float) -> tuple[float, float]:
    """Median of the window, and the modified z-score of a value on a log scale.

    Losses of exactly 0 and windows of equal values have a score, too.
    """
    logs = [math.log(max(x, _LEAST_VALUE)) for x in window]
    middle = median(logs)
    deviation = median([abs(x - middle) for x in logs]) / _NORMAL
    z = (math.log(max(value, _LEAST_VALUE)) - middle) / max(deviation, _LEAST_DEVIATION)
    return math.exp(middle), z
