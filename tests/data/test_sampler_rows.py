"""Steps over rows of several samples: a fixed number of samples, each row once an epoch."""

from __future__ import annotations

from itertools import chain, groupby

import pytest

from qcore.config.settings import Settings
from qcore.data.sampler import Schedule

SIZES = [1, 3, 2, 1, 5, 2, 1, 1, 4, 2]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_step_is_a_fixed_number_of_samples_and_an_epoch_each_row_once(batch: int) -> None:
    settings = Settings(
        per_device_train_batch_size=batch, gradient_accumulation_steps=2, num_train_epochs=3
    )
    schedule = Schedule(SIZES, settings)
    row_of = [row for row, size in enumerate(SIZES) for _ in range(size)]
    assert schedule.samples == sum(SIZES) == len(row_of)
    steps = [schedule.micro_batches(step) for step in range(schedule.total)]
    assert schedule.total == 3 * schedule.steps_per_epoch
    orders = []
    for epoch in range(3):
        mine = steps[epoch * schedule.steps_per_epoch : (epoch + 1) * schedule.steps_per_epoch]
        samples = list(chain.from_iterable(chain.from_iterable(mine)))
        assert sorted(samples) == list(range(sum(SIZES)))
        assert all(len(list(chain.from_iterable(step))) == 2 * batch for step in mine[:-1])
        rows = [row for row, _ in groupby(row_of[n] for n in samples)]
        assert sorted(rows) == list(range(len(SIZES)))  # the samples of a row are together
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]
    again = Schedule(SIZES, settings)
    assert again.micro_batches(schedule.total - 1) == steps[-1]  # without the steps before


def test_rows_of_one_sample_are_ordered_as_before() -> None:
    settings = Settings(seed=3)
    assert [Schedule(40, settings).micro_batches(n) for n in range(5)] == [
        Schedule([1] * 40, settings).micro_batches(n) for n in range(5)
    ]
