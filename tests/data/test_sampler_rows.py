"""Steps over rows of several samples, each row once an epoch; how full the packs of a step are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import chain, combinations, groupby

import pytest

from qcore.config.settings import Settings
from qcore.data.microbatches import _best_fit, _best_sum, _filled, extent, joined
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


# Steps of about so many tokens.


def drawn_lengths(seed: int, sizes: list[int]) -> list[int]:
    draw = random.Random(seed)
    return [min(2048, int(draw.lognormvariate(6, 1)) + 8) for _ in range(sum(sizes))]


@pytest.mark.parametrize("target", [3000, 10_000, 60_000])
@pytest.mark.parametrize("seed", range(3))
def test_steps_of_tokens_hold_whole_rows_and_about_the_tokens(target: int, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice([1, 1, 1, 2, 3]) for _ in range(400)]
    lengths = drawn_lengths(seed, sizes)
    settings = Settings(
        tokens_per_step=target, per_device_train_batch_size=3, num_train_epochs=2.5, seed=seed
    )
    schedule = Schedule(sizes, settings, lengths)
    row_of = [row for row, size in enumerate(sizes) for _ in range(size)]
    rows = [0] * len(sizes)
    for length, row in zip(lengths, row_of, strict=True):
        rows[row] += length
    per_epoch = schedule.steps_per_epoch
    assert per_epoch == round(sum(lengths) / target)
    assert schedule.total == math.ceil(2.5 * per_epoch)
    steps = [schedule.micro_batches(step) for step in range(3 * per_epoch)]
    mean = sum(lengths) / per_epoch
    for step in steps:
        assert all(len(batch) == 3 for batch in step[:-1])
        samples = list(chain.from_iterable(step))
        assert abs(sum(lengths[n] for n in samples) - mean) <= max(rows)
        for row, some in groupby(samples, lambda n: row_of[n]):  # whole rows, in order
            first = row_of.index(row)
            assert list(some) == list(range(first, first + sizes[row]))
    for epoch in range(3):
        mine = chain.from_iterable(steps[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(chain.from_iterable(mine)) == list(range(sum(sizes)))
    fresh = Schedule(sizes, settings, lengths)
    assert fresh.micro_batches(2 * per_epoch + 1) == steps[2 * per_epoch + 1]  # as when resumed


def test_every_step_of_tokens_has_a_row() -> None:
    """Rows that are longer than a step's share leave no step empty."""
    lengths = [5000, 10, 10, 10, 5000, 10]
    for target in (1, 10, 100, 1000, 6000, 10**9):
        settings = Settings(tokens_per_step=target)
        schedule = Schedule(len(lengths), settings, lengths)
        assert 1 <= schedule.steps_per_epoch <= len(lengths)
        steps = [schedule.micro_batches(step) for step in range(2 * schedule.steps_per_epoch)]
        assert all(steps)
        assert sorted(chain(*chain(*steps))) == sorted([*range(6)] * 2)


def test_the_order_of_rows_is_the_same_for_steps_of_tokens() -> None:
    lengths = drawn_lengths(0, SIZES)
    fixed, tokens = Settings(seed=5), Settings(seed=5, tokens_per_step=900)
    one, two = Schedule(SIZES, fixed), Schedule(SIZES, tokens, lengths)
    orders = [
        list(chain(*chain(*map(each.micro_batches, range(each.steps_per_epoch)))))
        for each in (one, two)
    ]
    assert orders[0] == orders[1]


# Packs of a step.

DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "lognormal": lambda draw: draw.lognormvariate(math.log(400), 1),
    "lognormal, longer": lambda draw: draw.lognormvariate(math.log(800), 0.7),
    "uniform": lambda draw: draw.uniform(64, 2048),
    "uniform, no short one": lambda draw: draw.uniform(1000, 2048),
}


@pytest.mark.parametrize("budgets", [8, 13, 40])
@pytest.mark.parametrize("most", [8192, 16384, 65_536])
@pytest.mark.parametrize("shape", DISTRIBUTIONS)
def test_packs_are_as_full_as_they_can_be(shape: str, most: int, budgets: int) -> None:
    """A step of 8 budgets and more takes at most 3 % more packs than the tokens need.

    The last pack holds the rest; all others together are at least 97 % full.
    """
    for seed in range(3):
        draw, lengths, total = random.Random(f"{shape} {seed}"), [], 0
        while total < budgets * most:
            lengths.append(min(2048, max(16, int(DISTRIBUTIONS[shape](draw)))))
            total += extent(lengths[-1:])
        packs = joined([[row] for row in range(len(lengths))], lengths, most)
        assert sorted(chain(*packs)) == list(range(len(lengths)))
        sizes = sorted(extent([lengths[row] for row in pack]) for pack in packs)
        assert sizes[-1] <= most
        assert math.ceil(sum(sizes) / most) >= 0.97 * len(packs)
        # The room that is left is at most that of one pack, and 3 % of the others.
        assert len(packs) * most - sum(sizes) <= most + 0.03 * (len(packs) - 1) * most


def test_filling_one_pack_after_another_takes_fewer_where_few_batches_fit() -> None:
    fewer = 0
    for seed in range(12):
        draw = random.Random(seed)
        lengths = [draw.randrange(1000, 2048) for _ in range(90)]
        sizes = [extent([length]) for length in lengths]
        order = sorted(range(len(sizes)), key=lambda n: -sizes[n])
        best, filled = (len(pack(order, sizes, 8192)) for pack in (_best_fit, _filled))
        assert len(joined([[n] for n in order], lengths, 8192)) == min(best, filled)
        assert filled == math.ceil(sum(sizes) / 8192)
        fewer += filled < best
    assert fewer


@pytest.mark.parametrize("most", [1, 7, 64])
def test_the_best_sum_is_that_of_all_choices(most: int) -> None:
    draw = random.Random(most)
    for _ in range(60):
        values = [draw.randrange(1, 30) for _ in range(draw.randrange(9))]
        sums = {sum(some) for n in range(len(values) + 1) for some in combinations(values, n)}
        chosen = _best_sum(values, most)
        assert sum(values[at] for at in chosen) == max(one for one in sums if one <= most)


def test_a_batch_beyond_the_limit_stays_alone() -> None:
    packs = joined([[0, 1], [2], [3], [4]], [900, 900, 100, 2000, 50], 1000)
    assert sorted(map(sorted, packs)) == [[0, 1], [2, 4], [3]]
