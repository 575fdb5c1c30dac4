"""The plan of a run with its own packs and GPU, and the error if it does not fit.

This file decides the memory budget of a run (`Room`), which policy it uses, and that a run that
does not fit is refused before a weight is read; if the settings name the policy, it is a warning.
`qcore.planning.planner` plans the step, `qcore.planning.packs` chooses the packs,
`qcore.planning.compare` formats the result.

On the CPU no limit and no rates are known: the settings decide the policy, and time is not
predicted.

Codes: ``QC-PLAN-001`` the run does not fit, ``-006`` the host has less memory than offload needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..config.settings import Settings
from ..data.microbatches import extent
from ..errors import InputError
from ..nn.kernels.registry import Chosen
from ..nn.offload import OffloadedInput
from ..plugins.resolve_model import Identified
from .compare import RunPlan
from .gpus import FRAGMENTS, Card, card_of
from .host_memory import available
from .packs import Packs, check_pack, holds
from .planner import Planner
from .policies import default_policy
from .report import Lengths, Pack, Plan, spelled, units_of
from .saved import PreviousPlan
from .step import LIBRARIES

TOKENS = 64  #: a row that is shorter is no advice
#: What micro-batches that run as one may take: beyond it a card gains nothing.
TOGETHER = (4096, 8192, 16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a run may fill.

    Attributes:
        card: whose memory and rates they are; ``None``: the CPU.
        budget: bytes that the run's tensors may take; ``None``: of a card all that a plan may
            fill, on the CPU no limit is known.
        host: bytes of the host that inputs of layers may be parked in; ``None``: not known.
    """

    card: Card | None = None
    budget: int | None = None
    host: int | None = None

    @property
    def limited(self) -> bool:
        """Whether anything can be too big."""
        return self.card is not None or self.budget is not None


def room_of(device: torch.device) -> Room:
    """What is free on `device` now; blocks that torch holds and does not use are free."""
    if device.type != "cuda":
        return Room()
    properties = torch.cuda.get_device_properties(device)
    card = replace(
        card_of(properties.name, properties.total_memory), memory=properties.total_memory
    )
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    # What libraries hold already is a term of the plan; what else is allocated stays.
    return Room(
        card=card,
        budget=min(card.budget, int(free * (1 - FRAGMENTS)) + min(allocated, LIBRARIES)),
        host=_host(device),
    )


def _host(device: torch.device) -> int | None:
    """What the host can give, and what an earlier run of this process holds there for `device`."""
    free = available()
    return None if free is None else free + OffloadedInput.pool(device).nbytes


def plan_run(
    found: Identified,
    settings: Settings,
    packs: Packs,
    room: Room,
    *,
    backends: Chosen | None = None,
    before: PreviousPlan | None = None,
    join: Callable[[int], Packs] | None = None,
) -> tuple[RunPlan, list[str]]:
    """The plan of a run, and what the user must be told beside it.

    Args:
        found: the model; its headers are enough.
        settings: the run's; where they name a policy it is taken.
        packs: what its rows make.
        room: what may be filled.
        backends: what the run has chosen.
        before: what the run had before it was stopped; taken again if it fits.
        join: the packs of the same rows where micro-batches run as one; by default none may.

    Raises:
        InputError: ``QC-PLAN-001`` it does not fit, and the settings leave the policy to the plan;
            ``-006`` it parks more than the host has.
        UsageError: ``QC-PLAN-005`` a pack is more than any micro-step may be.
    """
    for pack in packs.largest:
        check_pack(pack)
    planner = Planner(
        found, settings, room.card, backends=backends, budget=room.budget, host=room.host
    )
    by_hand = settings.recompute != "auto" or not settings.gradient_checkpointing
    before = before or PreviousPlan()
    packs, notes = _packs(planner, packs, join, before, room)
    policies, said = _policies(planner, packs, room, before.policies)
    notes += said
    worst = _worst_plan(planner, packs, policies)
    plan = RunPlan(
        worst=worst,
        usual=planner.plan(packs.usual, policies, packs.micro_steps),
        micro_steps=packs.micro_steps,
        together=packs.together,
        by_hand=by_hand,
        limited=room.limited,
    )
    if not worst.fits_host:
        raise _host_memory_refusal(worst, planner, packs)
    if room.limited and not worst.fits:
        error = refusal(worst, planner, packs, by_hand=by_hand)
        if not by_hand:
            raise error
        notes.append(f"warning: {error.code} {error.message}; {error.fix}")
    # Of torch's tensors on the CPU the line itself says all that its note does.
    return plan, [*notes, *(() if room.card is None else worst.notes)]


def _packs(
    planner: Planner,
    packs: Packs,
    join: Callable[[int], Packs] | None,
    before: PreviousPlan,
    room: Room,
) -> tuple[Packs, list[str]]:
    """As many micro-batches together as is fastest; as before the run was stopped, if it fits."""
    if join is None:
        return packs, []
    if before.together is not None:
        same = join(before.together) if before.together else packs
        policies = before.policies or planner.fastest(*same.largest).policies
        if not room.limited or _fits(planner, same, policies):
            return same, []
    found = _joined(planner, packs, join) if planner.timed else packs
    if before.together is None or before.together == found.together:
        return found, []
    return found, [
        f"micro-batches ran together up to {before.together} tokens before the run was stopped, "
        f"which does not fit now: up to {found.together} from here on, which adds in another order"
    ]


def _fits(planner: Planner, packs: Packs, policies: tuple[str, ...]) -> bool:
    """Whether these policies, or others that the settings allow, hold these packs."""
    known = len(policies) == len(planner.measure.kinds) and set(policies) <= set(planner.allowed())
    if known and _worst_plan(planner, packs, policies).fits:
        return True
    return _worst_plan(planner, packs, planner.fastest(*packs.largest).policies).fits


def _joined(planner: Planner, packs: Packs, join: Callable[[int], Packs]) -> Packs:
    """The packs whose steps are fastest: a short micro-step waits for the host.

    What is as large as the largest micro-batch costs no memory; more may, and is tried.
    """
    free = max(extent(pack, units_of(pack)) for pack in packs.largest)
    best, least = packs, _seconds(planner, packs)
    fewest = packs.micro_steps
    for most in (free, *(more for more in TOGETHER if more > free)):
        if fewest == 1:
            break
        tried = join(most)
        if tried.micro_steps < fewest:
            fewest, seconds = tried.micro_steps, _seconds(planner, tried)
            if seconds < least:
                best, least = tried, seconds
    return best


def _seconds(planner: Planner, packs: Packs) -> float:
    """Of an optimizer step under the fastest policy that fits; without end where none does."""
    policies = planner.fastest(*packs.largest).policies
    if not _worst_plan(planner, packs, policies).fits:
        return math.inf
    return planner.plan(packs.usual, policies, packs.micro_steps).seconds * packs.micro_steps


def _policies(
    planner: Planner, packs: Packs, room: Room, kept: tuple[str, ...]
) -> tuple[tuple[str, ...], list[str]]:
    layers = len(planner.measure.kinds)
    if not set(kept) <= set(planner.allowed()):
        kept = ()  # the settings name another
    if len(kept) == layers and (not room.limited or _worst_plan(planner, packs, kept).fits):
        return kept, [f"recompute as before the run was stopped: {spelled(kept)}"]
    if room.limited:
        chosen = planner.fastest(*packs.largest).policies
    else:
        chosen = (default_policy(planner.settings),) * layers
    if kept and kept != chosen:
        return chosen, [
            f"recompute was {spelled(kept)} before the run was stopped, which does not fit now: "
            f"{spelled(chosen)} from here on, which computes the same numbers"
        ]
    return chosen, []


def _worst_plan(planner: Planner, packs: Packs, policies: tuple[str, ...]) -> Plan:
    """The worst moment of the run: of a step, or of an evaluation."""
    plan = planner.worst(packs.largest, policies)
    if not packs.held_out:
        return plan
    memory = planner.evaluation(packs.held_out, packs.held_out_units)
    peak = sum(memory.values())
    if peak <= plan.peak:
        return plan
    return replace(
        plan, lengths=_held_out(packs), memory=memory, peak=peak, ops={}, timed=False,
        moment="evaluation of a held-out row",
    )  # fmt: skip


def _held_out(packs: Packs) -> Lengths:
    return Pack((packs.held_out,), packs.held_out_units)


def refusal(
    plan: Plan, planner: Planner, packs: Packs | None = None, *, by_hand: bool = False
) -> InputError:
    """The error that a plan is which does not fit, with what would.

    Args:
        plan: what does not fit.
        planner: who made it.
        packs: of the run; by default the plan's own.
        by_hand: whether the settings name the policy, so that another may fit.
    """
    return InputError(
        "QC-PLAN-001",
        "does not fit in the memory of the GPU",
        field="max_length",
        found=f"{plan.pack} under recompute {plan.recompute} take {plan.peak / 1e9:.3g} GB "
        f"({plan.moment}), most of it {plan.largest}",
        expected=f"at most {plan.budget / 1e9:.3g} GB",
        fix=" or ".join(_fixes(plan, planner, packs or _packs_of_plan(plan), by_hand))
        or "use a GPU with more memory, a smaller model, or fewer target_groups"
        + (", or rows with smaller media" if plan.units else ""),
    )


def _host_memory_refusal(plan: Plan, planner: Planner, packs: Packs) -> InputError:
    """Refused also where the policy was named: the system ends a process that pins too much."""
    fixes = _fixes(plan, planner, packs, by_hand=planner.settings.recompute != "auto")
    return InputError(
        "QC-PLAN-006",
        "offload needs more host memory than is available",
        field="recompute",
        found=f"{plan.host / 1e9:.3g} GB of pinned memory for {plan.pack}, "
        f"recompute {plan.recompute}",
        expected=f"at most {(plan.host_budget or 0) / 1e9:.3g} GB",
        fix=" or ".join(fixes) or "use a host with more memory, or a smaller model",
    )


def _packs_of_plan(plan: Plan) -> Packs:
    rows = len(plan.lengths)
    each = -(-plan.units // rows)
    return Packs(
        largest=(plan.lengths,), longest_rows=tuple(plan.lengths), usual=plan.lengths,
        micro_steps=1.0, most_units=(each,) * rows if each else (),
    )  # fmt: skip


def _fixes(plan: Plan, planner: Planner, packs: Packs, by_hand: bool) -> list[str]:
    """What fits, the least change first: each was planned."""
    fixes = []
    if by_hand:
        freed = planner.with_any_policy()
        other = _worst_plan(freed, packs, freed.fastest(*packs.largest).policies)
        if other.fits:
            fixes.append(f"with recompute=auto ({other.recompute}) it fits")
    if (rows := _rows(planner, packs)) > 0:
        fixes.append(f"with per_device_train_batch_size {rows} it fits")
    units = max((packs.held_out_units, *packs.most_units))
    longest = max(*packs.longest_rows, packs.held_out)
    if TOKENS <= (tokens := planner.longest(units=units)) < longest:
        one = "per_device_train_batch_size 1 and " if len(packs.longest_rows) > 1 else ""
        fixes.append(f"with {one}max_length {tokens} it fits")
    return fixes


def _rows(planner: Planner, packs: Packs) -> int:
    """How many rows fit, whichever meet, if less than there are; 0: not even one."""
    if packs.held_out:
        memory = planner.evaluation(packs.held_out, packs.held_out_units)
        if sum(memory.values()) > planner.budget:
            return 0
    low, high = 0, len(packs.longest_rows) - 1
    while low < high:
        middle = (low + high + 1) // 2
        rows = Pack(packs.longest_rows[:middle], sum(packs.most_units[:middle]))
        if holds(rows) and planner.fastest(rows).fits:
            low = middle
        else:
            high = middle - 1
    return low
