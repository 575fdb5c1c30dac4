"""Ranks that are started again share a number that ranks before them did not have."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from qcore.parallel.store import number_of_round, prefixed


def test_each_start_has_a_number_of_its_own() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        for expected in (1, 2, 3):
            ranks = (2, 0, 1) if expected == 2 else (0, 1, 2)
            tasks = [pool.submit(number_of_round, store, rank, 3, 10.0) for rank in ranks]
            assert [task.result() for task in tasks] == [expected] * 3
            prefixed(store, expected, "group").set("address", str(expected))
    assert prefixed(store, 2, "group").get("address") == b"2"


def test_a_start_that_a_rank_did_not_live_to_see_is_skipped() -> None:
    store = HashStore()
    with pytest.raises(RuntimeError, match="rank 1 has not come within 0 s"):
        number_of_round(store, 0, 2, 0.1)
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(number_of_round, store, rank, 2, 10.0) for rank in (0, 1)]
        assert [task.result() for task in tasks] == [2, 2]
