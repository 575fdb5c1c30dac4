"""Times a case in each placement: one card alone, then all ranks on the same weights and rows.

What is checked: every rank computes the same losses, all of them are finite, and those of the
first steps equal the losses of one card on the rows of all ranks.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from typing import TYPE_CHECKING

import torch

from qcore.nn.device import is_out_of_memory
from qcore.nn.model import Model
from qcore.parallel.world import World
from qcore.training.step import Loop

from .cases import POLICIES, Case
from .models import Plans, build, loop_of, reset
from .steps import COMPARED, losses_of, sum_ms, summary, timed
from .table import Record

if TYPE_CHECKING:
    from .rank import Rank

#: How far the first loss may be off that of one card. LoRA's B is zero, so that only the base and
#: the order of a sum over rows count; a wrong shard of the base shows here before anywhere else.
FIRST = 1e-6
UNSAID = ("policies", "fits")  #: of a plan; what the records leave out


def measure(rank: Rank, case: Case) -> bool:
    """Time a case in each of its placements; returns whether any of them is expected to fit.

    All placements have the policies that the first of them ran with, so that their times compare;
    only a sharded base that is too large for one card is planned anew.
    """
    timing = Timing(rank, case)
    whole = [one for one in case.placements if one == "one" or (one == "data" and rank.several)]
    fits = False
    if whole and timing.plan(whole[0]):
        fits = True
        model = timing.built()
        for _ in range(case.rounds):
            if "one" in whole and timing.plan("one"):
                while timing.one(model) and timing.plan("one", frugal=True):
                    pass
            if "data" in whole and timing.plan("data"):
                timing.together(model)
        del model
        clear()
    if "sharded" in case.placements and rank.several and timing.plan("sharded"):
        fits = True
        timing.together(timing.built(sharded=True))
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
        self._seconds: dict[str, list[float]] = {}  # of all rounds, by placement
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

    def built(self, *, sharded: bool = False) -> Model:
        """The model, whose bytes on each rank are noted."""
        before, began = self.rank.allocated(), time.perf_counter()
        chosen, world = self.rank.backends(self.case), self.rank.world if sharded else None
        model = build(self.case, chosen, self.rank.random, world=world)
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
            self._losses = found.pop("losses_of_all")
            self._seconds.setdefault("one", []).extend(found["step_seconds"][0])
        self._say(1, found)
        return "failed" in found

    def _one(self, model: Model) -> Record:
        alone, every = World.alone(), self.rank.world.size
        try:
            found = timed(self.rank, self._loop(model, 1, alone), self._count)
            losses = found["losses"]
            if every > 1:
                clear()
                losses = losses_of(self._loop(model, every, alone))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return {"failed": str(error)[:300], "out_of_memory": True}
        return self._checked([found]) | {"losses_of_all": losses}

    def together(self, model: Model) -> None:
        """Time all ranks, each with one micro-batch a step."""
        world = self.rank.world
        loop = self._loop(model, world.size, world)
        found = self._checked(world.gather(timed(self.rank, loop, self._count)))
        if self._losses:
            pairs = zip(found["losses"], self._losses, strict=True)
            found["off_one_card"] = [abs(ours / one - 1) for ours, one in pairs]
            found["same_first_loss"] = found["off_one_card"][0] < FIRST
        self._seconds.setdefault(self._placement, []).extend(found["step_seconds"][0])
        medians = {name: statistics.median(seconds) for name, seconds in self._seconds.items()}
        own = medians[self._placement]
        if "one" in medians:
            found["times_one"] = world.size * medians["one"] / own
        if self._placement == "sharded" and "data" in medians:
            found["of_data"] = medians["data"] / own
        found["trained"] = sum(parameter.numel() for parameter in loop.parameters)
        found["sum_ms"] = sum_ms(self.rank, loop)
        self._say(world.size, found)

    @property
    def _count(self) -> int:
        """Timed steps."""
        return self.case.steps or int(self.rank.given.steps)

    def _checked(self, ranks: list[Record]) -> Record:
        """Times of all ranks, and whether their losses are finite and the same."""
        losses = ranks[0]["losses"]
        return summary(ranks, len(ranks) * self.case.batch * self.case.seq) | {
            "losses": losses, "finite": all(map(math.isfinite, losses)),
            "same_on_all_ranks": all(rank["losses"] == losses for rank in ranks),
        }  # fmt: skip

    def _loop(self, model: Model, packs: int, world: World) -> Loop:
        """A loop with fresh adapters."""
        reset(model, self.rank.device)
        # What failed, and which policies it had, decides what is tried next.
        self.rank.policies = sorted(set(self._plan["policies"]), key=POLICIES.index)
        return loop_of(
            self.case, model, self.rank.device, self._plan["policies"], packs=packs,
            every=self.rank.world.size, steps=COMPARED + self._count, world=world,
        )  # fmt: skip

    def _say(self, ranks: int, found: Record) -> None:
        known = {
            "case": self.case.word, "placement": self._placement, "ranks": ranks,
            "weights_bytes": self._weights[:ranks], "layer_bytes": self._layers[:ranks],
        }  # fmt: skip
        expected = {name: value for name, value in self._plan.items() if name not in UNSAID}
        self.rank.say(known | expected | found)


def layer_bytes(model: Model) -> int:
    """Bytes of the 4-bit weights that a rank holds; where they are sharded, of all that is."""
    if model.sharded is not None:
        return model.sharded.bytes_held
    return sum(layer.stored_bytes for layer in model.lora_layers.values() if layer.four_bit)


def clear() -> None:
    """Give back what the last loop or model had; a loop freezes what lies there when it is made."""
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
