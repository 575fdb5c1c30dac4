"""Places in the host's memory: asked for once, of the largest pack, given out again in order."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from qcore.nn.offload import OffloadedInput, PinnedPool
from qcore.planning.host_memory import pinned

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
    pool = PinnedPool(made)
    for _ in range(3):
        places = [pool.take(32 * MIB) for _ in range(5)]
        assert len({place.data_ptr() for place in places}) == 5
        for place in places:
            pool.give_back(place)
    assert made.sizes == [32 * MIB] * 5
    assert pool.nbytes == 5 * 32 * MIB


def test_places_are_as_large_as_the_largest_pack_needs() -> None:
    """torch gives no pinned block back: a run whose packs grow must not ask twice."""
    made = Counted()
    pool = PinnedPool(made, least=9 * MIB + 1)
    for size in (3 * MIB, 9 * MIB, 5 * MIB, 9 * MIB + 1):
        places = [pool.take(size) for _ in range(4)]
        assert all(len(place) >= size for place in places)
        for place in places:
            pool.give_back(place)
    assert made.sizes == [16 * MIB] * 4
    assert pool.nbytes == pinned(9 * MIB + 1, 4) == 4 * 16 * MIB


def test_the_smallest_that_is_large_enough_is_taken() -> None:
    pool = PinnedPool(Counted())
    small, large = pool.take(2 * MIB), pool.take(8 * MIB)
    pool.give_back(large)
    pool.give_back(small)
    assert pool.take(MIB) is small
    assert pool.take(MIB) is large


def test_what_was_outgrown_is_counted_as_held() -> None:
    pool = PinnedPool(Counted())
    for size in (3 * MIB, 9 * MIB):
        pool.give_back(pool.take(size))
    assert pool.nbytes == (4 + 16) * MIB


def test_memory_that_cannot_be_pinned_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error is what is told, not what a half-made object says when it is collected."""

    def none(nbytes: int) -> Tensor:
        raise RuntimeError(f"{nbytes} bytes cannot be pinned")

    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    monkeypatch.setattr(OffloadedInput, "_streams", {torch.device("cpu"): None})
    monkeypatch.setattr(OffloadedInput, "_pools", {torch.device("cpu"): PinnedPool(none)})
    with pytest.raises(RuntimeError, match="64 bytes"):
        OffloadedInput(torch.zeros(16), None)
    gc.collect()
    assert said == []


class Stream:
    """Notes who waited for whom."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log = name, log

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The order of things, on a CPU that stands for a card."""
    noted: list[str] = []
    here, side = Stream("layers", noted), Stream("copies", noted)
    monkeypatch.setattr(OffloadedInput, "_streams", {torch.device("cpu"): side})
    monkeypatch.setattr(OffloadedInput, "_pools", {torch.device("cpu"): PinnedPool(Counted())})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(
        Tensor, "record_stream", lambda x, stream: noted.append(f"{stream.name} hold it")
    )
    return noted


def test_inputs_come_back_one_layer_ahead_of_their_backward(log: list[str]) -> None:
    pool = OffloadedInput.pool(torch.device("cpu"))
    for _ in range(2):
        log.clear()
        inputs = [torch.full((3, 5), float(n)) for n in range(4)]
        parked: list[OffloadedInput] = []
        for x in inputs:
            parked.append(OffloadedInput(x, parked[-1] if parked else None))
            # Parked when it is computed, and not given up before it is copied.
            assert log[-2:] == ["copies waits for layers", "copies hold it"]
        assert len(pool._free) == 0
        for n in reversed(range(4)):
            log.clear()
            assert torch.equal(parked[n].take(), inputs[n])
            assert log == ["layers waits for copies", "layers hold it"]
            # This one's place is free, and that of the layer below, which is on its way.
            assert len(pool._free) == min(4, 4 - n + 1)
        with pytest.raises(AssertionError, match="backward ran twice"):
            parked[0].take()
    assert len(pool.make.sizes) == 4  # type: ignore[attr-defined]


def test_what_no_backward_took_is_free_again(log: list[str]) -> None:
    pool = OffloadedInput.pool(torch.device("cpu"))
    parked = OffloadedInput(torch.zeros(3), None)
    assert len(pool._free) == 0
    del parked
    gc.collect()
    assert len(pool._free) == 1
