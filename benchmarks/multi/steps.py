"""Runs and times the steps of a loop on one rank.

Each step is synchronized. Beside its time stands that of the host until it has enqueued everything
that comes before the step's one transfer: where both are about equal, the host limits the step.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcore.training.step import Loop

from .table import Record

if TYPE_CHECKING:
    from .rank import Rank

COMPARED = 3  #: first steps, whose losses are compared; they warm up too


def timed(rank: Rank, loop: Loop, count: int) -> Record:
    """Warm up, then time `count` steps; what this rank saw of them.

    Returns:
        ``losses`` and ``first_seconds`` of the warm-up; ``seconds``, ``host`` (lists) and ``peak``
        (bytes) of the timed steps.
    """
    stepper = _Stepper(rank, loop)
    first, *others = (stepper.step(number) for number in range(COMPARED))
    losses = [first["loss"], *(step["loss"] for step in others)]
    steps = [stepper.step(number) for number in range(COMPARED, COMPARED + count)]
    return {
        "losses": losses, "first_seconds": first["seconds"],
        "seconds": [step["seconds"] for step in steps], "host": [step["host"] for step in steps],
        "peak": max(step["peak"] for step in steps),
    }  # fmt: skip


def losses_of(loop: Loop) -> list[float]:
    """Losses of the first steps."""
    return [float(loop.step(number)["loss"]) for number in range(COMPARED)]


class _Stepper:
    """Runs steps and notes when the host has enqueued them."""

    def __init__(self, rank: Rank, loop: Loop) -> None:
        self._rank, self._loop, self._enqueued = rank, loop, 0.0
        finished = loop._finished

        def noted(values: Tensor) -> Tensor:
            result = finished(values)
            self._enqueued = time.perf_counter()
            return result

        loop._finished = noted  # type: ignore[method-assign]

    def step(self, number: int) -> dict[str, Any]:
        began = time.perf_counter()
        loss = float(self._loop.step(number)["loss"])
        self._rank.wait()
        ended = time.perf_counter()
        peak = 0
        if self._rank.device.type == "cuda":  # a step resets the counter when it begins
            peak = torch.cuda.max_memory_allocated() - self._rank.random.nbytes
        return {
            "loss": loss, "seconds": ended - began, "host": self._enqueued - began, "peak": peak
        }  # fmt: skip


def summary(ranks: list[Record], tokens: int) -> Record:
    """What a record says of the timed steps of all ranks: times of rank 0, the host's of each.

    Args:
        ranks: what `timed` returned on each.
        tokens: of a step, over all ranks.
    """
    seconds = ranks[0]["seconds"]
    median = statistics.median(seconds)
    return {
        "tokens_per_second": tokens / median, "seconds": median, "least": min(seconds),
        "most": max(seconds), "first_seconds": ranks[0]["first_seconds"],
        "host_seconds": [statistics.median(rank["host"]) for rank in ranks],
        "step_seconds": [[round(one, 4) for one in rank["seconds"]] for rank in ranks],
        "step_host": [[round(one, 4) for one in rank["host"]] for rank in ranks],
        "peak_bytes": [rank["peak"] for rank in ranks],
    }  # fmt: skip


def sum_ms(rank: Rank, loop: Loop, times: int = 10) -> float:
    """Milliseconds of one sum of all gradients over the ranks, with nothing beside it.

    The gradients are zero between steps, and stay so.
    """
    values = loop.optimizer.flat.grad  # type: ignore[attr-defined]
    rank.world.sum_(values)
    rank.wait()
    rank.world.barrier()
    began = time.perf_counter()
    for _ in range(times):
        rank.world.sum_(values)
    rank.wait()
    return (time.perf_counter() - began) / times * 1e3
