"""Which packs of a run are planned: those that its schedule really makes."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from qcore.config.settings import Settings
from qcore.data.microbatches import extent, joined
from qcore.data.sampler import Schedule
from qcore.errors import UsageError
from qcore.planning.packs import MOST, check_pack, holds, packs_of


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


def alone(lengths: list[int], batch: int) -> int:
    """A seed by which the first row is left over for the last pack."""
    for seed in range(1000):
        chosen = Settings(per_device_train_batch_size=batch, seed=seed, max_steps=1)
        if Schedule(len(lengths), chosen).micro_batches(0)[-1] == [0]:
            return seed
    raise AssertionError("no such seed")


def test_most_tokens_and_most_tiles_may_be_two_packs() -> None:
    """300 tokens in one row are more tokens; 240 in three rows are more tiles."""
    lengths = [300, 80, 80, 80]
    seed = alone(lengths, 3)
    packs = packs_of(lengths, [], Settings(per_device_train_batch_size=3, seed=seed, max_steps=1))
    assert packs.largest == ((300,), (80, 80, 80))
    few = [500, 80, 80, 80]  # here one pack has both
    packs = packs_of(few, [], Settings(per_device_train_batch_size=3, seed=seed, max_steps=1))
    assert packs.largest == ((500,),)


def test_a_held_out_row_is_alone() -> None:
    assert packs_of([5, 6], [7, 9000], settings()).held_out == 9000
    assert packs_of([5, 6], [], settings()).held_out == 0


def test_an_endless_run_is_bounded_by_its_longest_rows() -> None:
    lengths = [10] * 50 + [400, 300]
    packs = packs_of(lengths, [], settings(max_steps=10**7, per_device_train_batch_size=2), draws=8)
    assert packs.largest == ((400, 300),)


@pytest.mark.parametrize("pack", [(1 << 20,) * 3, (1 << 20,), (MOST - 64,), (64,) * 32767])
def test_what_a_micro_step_may_hold(pack: tuple[int, ...]) -> None:
    assert holds(pack)
    check_pack(pack)


@pytest.mark.parametrize(
    ("pack", "fits"), [((1 << 20,) * 8192, 3), ((MOST - 63,), 0), ((2,) * 65536, 63549)]
)
def test_more_than_kernels_number_is_refused(pack: tuple[int, ...], fits: int) -> None:
    """Chunks of 64 tokens are numbered along an axis that ends at 65535."""
    with pytest.raises(UsageError) as caught:
        check_pack(pack)
    error = caught.value
    assert (error.code, error.field) == ("QC-PLAN-005", "per_device_train_batch_size")
    assert f"{len(pack)} rows, {sum(pack)} tokens in all" in error.message
    assert f"lower it to {fits}," in str(error.fix)
    assert "\n" not in error.message
    assert not fits or holds(pack[:fits])
    assert not holds(pack[: fits + 1])


# -- micro-batches that run as one


def drawn(lengths: list[int], chosen: Settings, together: int) -> list[list[list[int]]]:
    """The rows of each micro-step of each step."""
    schedule = Schedule(len(lengths), chosen)
    return [
        joined(schedule.micro_batches(step), lengths, together) for step in range(schedule.total)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("batch", "together"), [(1, 1000), (1, 4096), (3, 2048), (2, 100)])
def test_joined_micro_batches_are_the_same_rows_and_no_larger(
    seed: int, batch: int, together: int
) -> None:
    random.seed(seed)
    lengths = [random.choice([3, 17, 64, 800, 801, 1500]) for _ in range(37)]
    chosen = settings(
        per_device_train_batch_size=batch, gradient_accumulation_steps=8, num_train_epochs=2
    )
    schedule, steps = Schedule(len(lengths), chosen), drawn(lengths, chosen, together)
    for step, batches in enumerate(steps):
        alone = schedule.micro_batches(step)
        assert sorted(chain(*batches)) == sorted(chain(*alone))
        for rows in batches:
            assert extent([lengths[row] for row in rows]) <= together or rows in alone
        # No two of them fit together: first fit leaves none half empty beside another.
        sizes = sorted(extent([lengths[row] for row in rows]) for rows in batches)
        assert len(sizes) == 1 or sizes[0] + sizes[1] > together
    packs = packs_of(lengths, [], chosen, together=together)
    extents = [extent([lengths[row] for row in rows]) for batches in steps for rows in batches]
    assert max(map(extent, packs.largest)) == max(extents)
    assert packs.micro_steps == len(extents) / len(steps)


def test_of_an_endless_run_the_bound_is_what_may_meet() -> None:
    lengths = [10] * 50 + [400, 300]
    chosen = settings(max_steps=10**7, gradient_accumulation_steps=64)
    packs = packs_of(lengths, [], chosen, together=1000, draws=8)
    (bound,) = packs.largest
    most = max(extent([lengths[r] for r in rows]) for rows in drawn(lengths, settings(
        max_steps=20, gradient_accumulation_steps=64), 1000)[3])  # fmt: skip
    assert most <= 1000 <= extent(bound)
