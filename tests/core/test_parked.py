"""Places in the host's memory: asked for once, given out again, growing with what is parked."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch import Tensor

from qcore.nn.parked import Lot, Parked
from qcore.plan.host import pinned

MIB = 1 << 20


class Counted:
    """Memory that counts how often it was asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, nbytes: int) -> Tensor:
        self.sizes.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)


def test_a_second_step_asks_for_nothing() -> None:
    made = Counted()
    lot = Lot(made)
    for _ in range(3):
        places = [lot.take(32 * MIB) for _ in range(5)]
        assert len({place.data_ptr() for place in places}) == 5
        for place in places:
            lot.give_back(place)
    assert made.sizes == [32 * MIB] * 5
    assert lot.nbytes == 5 * 32 * MIB


def test_places_are_as_large_as_the_largest_pack_needs() -> None:
    """torch gives no pinned block back: a run whose packs grow must not ask twice."""
    made = Counted()
    lot = Lot(made, least=9 * MIB + 1)
    for size in (3 * MIB, 9 * MIB, 5 * MIB, 9 * MIB + 1):
        places = [lot.take(size) for _ in range(4)]
        assert all(len(place) >= size for place in places)
        for place in places:
            lot.give_back(place)
    assert made.sizes == [16 * MIB] * 4
    assert lot.nbytes == pinned(9 * MIB + 1, 4) == 4 * 16 * MIB


def test_the_smallest_that_is_large_enough_is_taken() -> None:
    lot = Lot(Counted())
    small, large = lot.take(2 * MIB), lot.take(8 * MIB)
    lot.give_back(large)
    lot.give_back(small)
    assert lot.take(MIB) is small
    assert lot.take(MIB) is large


def test_what_was_outgrown_is_counted_as_held() -> None:
    lot = Lot(Counted())
    for size in (3 * MIB, 9 * MIB):
        lot.give_back(lot.take(size))
    assert lot.nbytes == (4 + 16) * MIB


def test_memory_that_cannot_be_pinned_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is what is told, not what a half-made object says when it is collected."""

    def none(nbytes: int) -> Tensor:
        raise RuntimeError(f"{nbytes} bytes cannot be pinned")

    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    monkeypatch.setattr(Parked, "_streams", {torch.device("cpu"): None})
    monkeypatch.setattr(Parked, "_lots", {torch.device("cpu"): Lot(none)})
    with pytest.raises(RuntimeError, match="64 bytes"):
        Parked(torch.zeros(16), None)
    gc.collect()
    assert said == []
