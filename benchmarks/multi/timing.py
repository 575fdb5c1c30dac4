"""Times a case in each placement: one card alone, then all ranks on the same weights and rows.

What is checked: every rank computes the same losses, all of them are finite, and those of the
first steps equal the losses of one card on the rows of all ranks.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from qcore.nn.device import is_out_of_memory
from qcore.nn.model import Model
from qcore.parallel.world import World
from qcore.training.step import Loop

from .cases import POLICIES, Case
from .models import Plans, build, loop_of, reset

if TYPE_CHECKING:
    from .rank import Rank

COMPARED = 3  #: first steps, whose losses are compared; they warm up too
UNSAID = ("policies", "fits")  #: of a plan; what the records leave out
Record = dict[str, Any]


def measure(rank: Rank, case: Case) -> bool:
    """Time a case in each of its placements; returns whether any of them is expected to fit.

    All placements have the policies that the first of them ran with, so that their times compare.
    """
    timing = Timing(rank, case)
    whole = [one for one in case.placements if one == "one" or (one == "data" and rank.several)]
    fits = False
    if whole and timing.plan(whole[0]):
        fits = True
        model = timing.built()
        if "one" in whole:
            while timing.one(model) and timing.plan("one", frugal=True):
                pass
        if "data" in whole and timing.plan("data"):
            timing.together(model)
        del model
        clear()
    return fits


class Timing:
    """Times one case, and holds what one placement needs to know of another.

    Args:
        rank: this process.
        case: what to time.
    """

    def __init__(self, rank: Rank, case: Case) -> None:
        self.rank, self.case = rank, case
        self._plans: Plans | None = None
        if rank.world.first:
            began = time.perf_counter()
            self._plans = Plans(case, rank.backends(case), rank.device)
            rank.note(f"{case.word}: a planner in {time.perf_counter() - began:.1f} s")
        else:
            rank.backends(case)
        self._placement, self._plan = "", Record()
        self._rate: float | None = None  # tokens/s of one card
        self._of_all: float | None = None  # tokens/s of all ranks with the whole base each
        self._losses: list[float] = []  # of one card on the rows of all ranks
        self._weights: list[int] = []  # of each rank
        self._layers: list[int] = []  # of each rank, 4-bit weights alone

    def plan(self, placement: str, *, frugal: bool = False) -> bool:
        """Plan a placement; returns whether it is expected to fit, and says where it is not.

        Args:
            placement: of the weights.
            frugal: under the next policy that takes less memory than the one that was planned.
        """
        world, policies = self.rank.world, self._plan.get("policies")
        if frugal and policies:
            least = max(map(POLICIES.index, policies))
            if least + 1 == len(POLICIES):
                return False
            policies = [POLICIES[least + 1]] * self.case.count
        plan = Record()
        if self._plans is not None:
            plan = self._plans.of(placement, world.size, policies)
        self._placement, plan = placement, world.wait(plan)[0]
        if plan["fits"]:
            self._plan = plan
        else:
            size = f"planned peak {plan['plan_bytes'] / 1e9:.1f} GB"
            self.rank.say({"case": self.case.word, "skipped": placement, "why": size})
        return bool(plan["fits"])

    def built(self) -> Model:
        """The model, whose bytes on each rank are noted."""
        before, began = self.rank.allocated(), time.perf_counter()
        model = build(self.case, self.rank.backends(self.case), self.rank.random)
        held = self.rank.allocated() - before
        self._layers = self.rank.world.wait(layer_bytes(model))
        self.rank.note(f"{self.case.word}: weights in {time.perf_counter() - began:.1f} s")
        self._weights = self.rank.world.wait(held)
        return model

    def one(self, model: Model) -> bool:
        """Time rank 0 alone, the others idle; then the rows of all ranks on it, for the losses.

        Returns:
            Whether it ran out of memory.
        """
        found = self._one(model) if self.rank.world.first else {}
        found = self.rank.world.wait(found)[0]
        clear()
        if "failed" not in found:
            self._rate, self._losses = found["tokens_per_second"], found.pop("losses_of_all")
        self._say(1, found)
        return "failed" in found

    def _one(self, model: Model) -> Record:
        alone, every = World.alone(), self.rank.world.size
        try:
            found = self._timed(self._loop(model, 1, alone), alone)
            losses = found["losses"]
            if every > 1:
                clear()
                loop = self._loop(model, every, alone)
                losses = [float(loop.step(number)["loss"]) for number in range(COMPARED)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return {"failed": str(error)[:300], "out_of_memory": True}
        return found | {"losses_of_all": losses}

    def together(self, model: Model) -> None:
        """Time all ranks, each with one micro-batch a step."""
        world = self.rank.world
        loop = self._loop(model, world.size, world)
        found = self._timed(loop, world)
        every = world.gather(found["losses"])
        found["same_on_all_ranks"] = all(losses == every[0] for losses in every)
        if self._losses:
            pairs = zip(found["losses"], self._losses, strict=True)
            found["off_one_card"] = [abs(ours / one - 1) for ours, one in pairs]
        if self._rate:
            found["times_one"] = found["tokens_per_second"] / self._rate
        if self._placement == "data":
            self._of_all = found["tokens_per_second"]
        elif self._of_all:
            found["of_data"] = found["tokens_per_second"] / self._of_all
        found["trained"] = sum(parameter.numel() for parameter in loop.parameters)
        found["sum_ms"] = sum_ms(self.rank, found["trained"])
        self._say(world.size, found)

    def _loop(self, model: Model, packs: int, world: World) -> Loop:
        """A loop with fresh adapters."""
        reset(model, self.rank.device)
        return loop_of(
            self.case, model, self.rank.device, self._plan["policies"], packs=packs,
            every=self.rank.world.size, steps=COMPARED + self.rank.given.steps, world=world,
        )  # fmt: skip

    def _timed(self, loop: Loop, world: World) -> Record:
        """Warm up, then time steps, each synchronized; the median, and each rank's peak."""
        step: Callable[[int], float] = partial(self._step, loop)
        began = time.perf_counter()
        losses = [step(0)]
        first = time.perf_counter() - began
        losses += [step(number) for number in range(1, COMPARED)]
        seconds, peak = [], 0
        for number in range(COMPARED, COMPARED + self.rank.given.steps):
            began = time.perf_counter()
            step(number)
            seconds.append(time.perf_counter() - began)
            if self.rank.device.type == "cuda":  # a step resets the counter when it begins
                peak = max(peak, torch.cuda.max_memory_allocated() - self.rank.random.nbytes)
        median = statistics.median(seconds)
        return {
            "tokens_per_second": world.size * self.case.batch * self.case.seq / median,
            "seconds": median, "least": min(seconds), "most": max(seconds),
            "first_seconds": first, "losses": losses, "finite": all(map(math.isfinite, losses)),
            "peak_bytes": world.gather(peak),
        }  # fmt: skip

    def _step(self, loop: Loop, number: int) -> float:
        loss = float(loop.step(number)["loss"])
        self.rank.wait()
        return loss

    def _say(self, ranks: int, found: Record) -> None:
        known = {
            "case": self.case.word, "placement": self._placement, "ranks": ranks,
            "weights_bytes": self._weights[:ranks], "layer_bytes": self._layers[:ranks],
        }  # fmt: skip
        expected = {name: value for name, value in self._plan.items() if name not in UNSAID}
        self.rank.say(known | expected | found)


def layer_bytes(model: Model) -> int:
    """Bytes of the 4-bit weights that a rank holds."""
    return sum(layer.stored_bytes for layer in model.lora_layers.values() if layer.four_bit)


def sum_ms(rank: Rank, count: int, times: int = 10) -> float:
    """Milliseconds of one sum of so many float32 over the ranks, with nothing beside it."""
    values = torch.zeros(count, device=rank.device)
    rank.world.sum_(values)
    rank.wait()
    rank.world.barrier()
    began = time.perf_counter()
    for _ in range(times):
        rank.world.sum_(values)
    rank.wait()
    return (time.perf_counter() - began) / times * 1e3


def clear() -> None:
    """Give back what the last loop or model had; a loop freezes what lies there when it is made."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
