"""The learning rate of an optimizer step: linear warm-up, then a cosine to zero.

A pure function of the step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math

from ..config.settings import Settings


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """The rate of a step.

    The first step already has one: with the schedule of transformers it would be zero and
    train nothing.

    Args:
        settings: of these `learning_rate`, the peak, and `warmup_ratio` count.
        step: from 0.
        total: steps of the run.
    """
    warmup = math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
