"""Micro-batches are spread over ranks evenly, and as a function of their costs alone."""

from __future__ import annotations

import random

import pytest

from qcore.data.microbatches import cost, extent, spread


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_each_micro_batch_is_on_one_rank(ranks: int) -> None:
    costs = [random.Random(ranks).uniform(1, 100) for _ in range(21)]
    shares = spread(costs, ranks)
    assert len(shares) == ranks
    assert sorted(number for share in shares for number in share) == list(range(21))
    assert all(share == sorted(share) for share in shares)
    assert shares == spread(costs, ranks)


def test_the_longest_rank_is_near_the_mean() -> None:
    """Longest processing time first is at most 4/3 of the best (Graham 1969)."""
    generator = random.Random(0)
    for ranks in (2, 4, 7):
        costs = [generator.expovariate(1 / 500) for _ in range(8 * ranks)]
        loads = [sum(costs[n] for n in share) for share in spread(costs, ranks)]
        best = max(sum(costs) / ranks, max(costs))
        assert max(loads) <= 4 / 3 * best
        assert sum(loads) == pytest.approx(sum(costs))


def test_equal_costs_keep_their_order() -> None:
    assert spread([1.0] * 5, 2) == [[0, 2, 4], [1, 3]]


def test_fewer_micro_batches_than_ranks_leave_ranks_idle() -> None:
    assert spread([3.0, 5.0], 4) == [[1], [0], [], []]
    assert spread([], 2) == [[], []]


def test_a_long_row_costs_more_than_short_ones_with_as_many_tokens() -> None:
    assert cost([65536]) > cost([16384] * 4) > extent([65536])
    assert cost([100], 50) == cost([100]) + 50


@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_each_goes_to_the_rank_with_the_least_cost_so_far(ranks: int) -> None:
    costs = [float(random.Random(7 * n).randrange(1, 9)) for n in range(300)]
    loads, expected = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for number in sorted(range(300), key=lambda n: (-costs[n], n)):
        rank = loads.index(min(loads))
        loads[rank] += costs[number]
        expected[rank].append(number)
    assert spread(costs, ranks) == [sorted(share) for share in expected]
