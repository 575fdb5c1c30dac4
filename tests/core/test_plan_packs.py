"""Which packs of a run are planned: those that its schedule really makes."""

from __future__ import annotations

import random

import pytest

from qcore.plan_packs import packs_of
from qcore.schedule import Schedule
from qcore.settings import Settings


def settings(**given: int) -> Settings:
    return Settings(**({"gradient_accumulation_steps": 1} | given))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("epochs", [1.0, 2.5])
def test_no_pack_of_the_run_is_larger(batch: int, epochs: float) -> None:
    random.seed(batch)
    lengths = [random.choice([3, 17, 64, 800, 801]) for _ in range(23)]
    chosen = Settings(per_device_train_batch_size=batch, num_train_epochs=epochs)
    schedule, packs = Schedule(len(lengths), chosen), packs_of(lengths, [], chosen)
    drawn = [
        [lengths[row] for row in rows]
        for step in range(schedule.total)
        for rows in schedule.micro_batches(step)
    ]
    assert max(map(sum, packs.largest)) == max(map(sum, drawn))
    assert all(sorted(pack) in [sorted(one) for one in drawn] for pack in packs.largest)
    mean = sum(map(sum, drawn)) / len(drawn)
    assert abs(sum(packs.usual) - mean) == min(abs(sum(one) - mean) for one in drawn)
    assert packs.micro_steps == len(drawn) / schedule.total
    assert packs.longest_rows == tuple(sorted(lengths)[-batch:][::-1])


def test_one_very_long_row_counts_only_where_it_is_drawn() -> None:
    lengths = [10] * 20 + [5000]
    assert packs_of(lengths, [], settings(num_train_epochs=1)).largest[0] == (5000,)
    short = packs_of(lengths, [], settings(max_steps=1, seed=1))
    assert short.largest == ((10,),)
    assert short.longest_rows == (5000,)


def test_many_short_rows_are_planned_beside_one_long_one() -> None:
    """Tokens are fewer, but every document has a last tile."""
    lengths = [1000] + [31] * 31
    packs = packs_of(lengths, [], settings(per_device_train_batch_size=16))
    assert len(packs.largest) <= 2
    assert max(map(sum, packs.largest)) == 1000 + 15 * 31
    uneven = packs_of([900, 30, 30, 30], [], settings(per_device_train_batch_size=3, seed=5))
    assert {len(pack) for pack in uneven.largest} <= {1, 3}


def test_a_held_out_row_is_alone() -> None:
    assert packs_of([5, 6], [7, 9000], settings()).held_out == 9000
    assert packs_of([5, 6], [], settings()).held_out == 0


def test_an_endless_run_is_bounded_by_its_longest_rows() -> None:
    lengths = [10] * 50 + [400, 300]
    packs = packs_of(lengths, [], settings(max_steps=10**9, per_device_train_batch_size=2), draws=8)
    assert packs.largest == ((400, 300),)
