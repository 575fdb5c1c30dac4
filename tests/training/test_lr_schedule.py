"""The learning rate: linear warm-up from the first step on, then a cosine to zero."""

from __future__ import annotations

import math

import pytest

from qcore.config.settings import Settings
from qcore.training.lr_schedule import learning_rate


def test_warm_up_and_cosine() -> None:
    settings = Settings(learning_rate=1.0, warmup_ratio=0.25)
    rates = [learning_rate(settings, step, 8) for step in range(8)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * n / 6)) for n in range(6)])


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.99])
@pytest.mark.parametrize("total", [1, 2, 100])
def test_every_step_has_a_rate_up_to_the_peak(ratio: float, total: int) -> None:
    settings = Settings(learning_rate=2e-4, warmup_ratio=ratio)
    rates = [learning_rate(settings, step, total) for step in range(total)]
    assert all(0 < rate <= 2e-4 for rate in rates)
