"""Places in the host's memory: asked for once, given out again, growing with what is parked."""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.nn.parked import Lot

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


def test_a_larger_pack_takes_the_place_of_a_smaller_one() -> None:
    made = Counted()
    lot = Lot(made)
    for size in (3 * MIB, 9 * MIB, 5 * MIB, 9 * MIB + 1):
        places = [lot.take(size) for _ in range(4)]
        assert all(len(place) >= size for place in places)
        for place in places:
            lot.give_back(place)
    assert made.sizes == [4 * MIB] * 4 + [16 * MIB] * 4
    assert lot.nbytes == 4 * 16 * MIB


def test_the_smallest_that_is_large_enough_is_taken() -> None:
    lot = Lot(Counted())
    small, large = lot.take(2 * MIB), lot.take(8 * MIB)
    lot.give_back(large)
    lot.give_back(small)
    assert lot.take(MIB) is small
    assert lot.take(MIB) is large
