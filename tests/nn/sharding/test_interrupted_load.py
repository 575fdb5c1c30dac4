"""Loading a sharded base that a signal or an error of one rank ends: no rank waits for another."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qcore.errors import Interrupted
from qcore.io.stop_signals import StopNow, StopSignals
from qcore.nn.sharding import load as sharded_load
from qcore.nn.sharding.base import _quantized
from qcore.nn.sharding.codes import as_parameter
from qcore.parallel.world import World
from qcore.training import loading
from qcore.training.stopping import before_steps


class Recorded:
    """Takes the place of what places tensors, and records what it is asked."""

    def __init__(self) -> None:
        self.items: tuple[Any, ...] = ()
        self.digests: dict[str, str] = {}
        self.calls: list[str] = []

    def take(self, part: Any) -> None:
        part.happens()
        self.calls.append("take")

    def fail(self) -> None:
        self.calls.append("fail")

    def exchange(self) -> None:
        self.calls.append("exchange")


def nothing() -> None:
    """What happens in most parts."""


def load(
    monkeypatch: pytest.MonkeyPatch, *happens: Callable[[], None], stop: StopSignals | None = None
) -> list[str]:
    """Load a base of one part for each of the things that happen while it is placed."""
    recorded, unused = Recorded(), SimpleNamespace()
    parts = [SimpleNamespace(read=0, happens=each) for each in happens]
    monkeypatch.setattr(sharded_load, "_Loading", lambda *arguments: recorded)
    monkeypatch.setattr(sharded_load, "_read", lambda *arguments: iter(parts))
    base: Any = SimpleNamespace(world=World.alone())
    try:
        sharded_load.load_shards(
            base, unused, unused, unused,  # type: ignore[arg-type]
            device=torch.device("cpu"), quantize=True, stop=stop,
        )  # fmt: skip
    except (StopNow, RuntimeError) as error:
        recorded.calls.append(type(error).__name__)
    return recorded.calls


def test_a_signal_acts_between_two_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopSignals()

    def signal() -> None:
        stop.asked = "SIGTERM"
        stop._raise_if_due()

    with stop.abandoning(), stop.finishing():
        calls = load(monkeypatch, nothing, signal, nothing, stop=stop)
        stop.asked = ""
    assert calls == ["take", "take", "fail", "StopNow"]


def test_out_of_memory_on_one_rank_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    def lost() -> None:
        raise RuntimeError("gloo: connection closed by peer")

    assert load(monkeypatch, nothing, no_memory) == ["take", "fail", "OutOfMemoryError"]
    assert load(monkeypatch, lost) == ["RuntimeError"], "no rank is left to wait for"
    assert load(monkeypatch, nothing) == ["take", "exchange"]


@pytest.mark.parametrize("sharded", [True, False])
def test_a_base_that_ranks_exchange_is_not_left_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    stop, whole = StopSignals(), []

    def loaded(*arguments: Any) -> None:
        stop.asked = "SIGTERM"
        stop._raise_if_due()
        whole.append(True)

    monkeypatch.setattr(loading, "_loaded", loaded)
    unused: Any = None
    with pytest.raises(StopNow), stop.abandoning():
        loading.load_base(unused, sharded=sharded, stop=stop)
    assert whole == [True] * sharded


def test_a_rank_that_another_one_ends_names_a_signal() -> None:
    with (
        pytest.raises(Interrupted, match="stopped by a signal to another rank while the base was"),
        before_steps(StopSignals(), "the base was loading"),
    ):
        raise StopNow


def test_the_others_are_told_in_the_next_exchange() -> None:
    """Which is that of a tensor whose exchange has not begun, whether or not it was read."""
    items = [SimpleNamespace(tensor=SimpleNamespace(name=name)) for name in ("a", "b", "norm", "c")]
    failed: list[str] = []
    base = SimpleNamespace(exchanged={"a"}, fail=failed.append, world=World.alone())
    rank: Any = SimpleNamespace(
        items=items, _base=base,
        _is_exchanged=lambda item: item.tensor.name != "norm",
    )  # fmt: skip
    sharded_load._Loading.fail(rank)
    base.exchanged |= {"b"}
    sharded_load._Loading.fail(rank)
    assert failed == ["b", "c"]


def test_a_rank_without_rows() -> None:
    """48 ranks of 512 rows: the last one has none."""
    packed, scales = _quantized(torch.empty(0, 128), 128)
    assert packed.shape == (0, 64)
    assert scales.shape == (0, 2)
    packed, scales = _quantized(torch.ones(3, 128), 128)
    assert packed.shape == (3, 64)
    assert scales.shape == (3, 2)
    for name, codes in (("packed", packed), ("absmax", scales.to(torch.uint8))):
        assert len(as_parameter(codes[:0], name)) == 0
