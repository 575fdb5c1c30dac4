"""Compares the gradients of a step of all ranks with those of one, in each placement.

The yardstick is the error of bfloat16 itself: how far the gradients of one rank are from those of
the same weights and rows in float32. What the ranks compute differs from one rank by the order of
sums alone, so it must lie far below.
"""

from __future__ import annotations

import hashlib
import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcore.nn.model import Model
from qcore.parallel.world import World

from .cases import Case
from .models import build, loop_of, reset
from .timing import clear

if TYPE_CHECKING:
    from .rank import Rank

Gradients = dict[str, Tensor]
B = 0.01  #: deviation of LoRA's B: with zeros, A would have no gradient


def compare(rank: Rank, case: Case) -> None:
    """Record how far gradients of all ranks are from those of one."""
    chosen, world = rank.backends(case), rank.world
    one: Gradients = {}
    if world.first:
        exact = build(case, chosen, rank.random, dtype=torch.float32)
        reference = gradients(rank, case, exact, World.alone())
        del exact
        clear()
    model = build(case, chosen, rank.random)
    if world.first:
        one = gradients(rank, case, model, World.alone())
        rank.say(
            {"case": case.word, "placement": "one", "ranks": 1, "beside": "float32",
             **apart(one, reference)}
        )  # fmt: skip
        del reference
    world.wait(None)
    if "data" in case.placements and rank.several:
        _of_all(rank, case, model, one, "data")
    if "sharded" in case.placements and rank.several:
        del model
        clear()
        sharded = build(case, chosen, rank.random, world=world)
        _of_all(rank, case, sharded, one, "sharded")


def _of_all(rank: Rank, case: Case, model: Model, one: Gradients, placement: str) -> None:
    clear()
    found = gradients(rank, case, model, rank.world)
    digests = rank.world.gather(digest(found))
    if rank.world.first:
        rank.say(
            {"case": case.word, "placement": placement, "ranks": rank.world.size,
             "beside": "one rank", **apart(found, one),
             "same_on_all_ranks": len(set(digests)) == 1}
        )  # fmt: skip


def gradients(rank: Rank, case: Case, model: Model, world: World) -> Gradients:
    """Gradients of the first step over the rows of all ranks, by name, not clipped."""
    reset(model, rank.device, b=B)
    loop = loop_of(
        case, model, rank.device, ("none",) * case.count, packs=rank.world.size,
        every=rank.world.size, steps=1, world=world, clip=0.0,
    )  # fmt: skip
    found: Gradients = {}

    def keep(*_: Any) -> None:
        for name, parameter in model.trainable():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()

    loop.optimizer.register_step_pre_hook(keep)
    loop.step(0)
    return found


def digest(values: Gradients) -> str:
    """Of the bits of all values."""
    found = hashlib.sha256()
    for value in values.values():
        found.update(value.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def apart(values: Gradients, others: Gradients) -> dict[str, Any]:
    """Norm of the difference over norm, by tensor: the worst and the median."""
    assert values.keys() == others.keys(), "other tensors have gradients"
    errors = {
        name: float((value - others[name]).norm() / others[name].norm())
        for name, value in values.items()
    }
    assert all(errors[name] == errors[name] for name in errors), "a gradient is zero or no number"
    worst = max(errors, key=lambda name: errors[name])
    return {
        "worst": errors[worst], "median": statistics.median(errors.values()), "tensor": worst,
        "tensors": len(errors),
    }  # fmt: skip
