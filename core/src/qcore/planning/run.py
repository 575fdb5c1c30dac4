"""Plans a run before training: its memory budget and policies, and the error if it does not fit.

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
from .links import Ranks
from .packs import Packs, check_pack, holds
from .planner import Planner
from .policies import default_policy
from .report import Lengths, Pack, Plan, spelled, units_of
from .saved import PreviousPlan
from .shared import FITS, asked_for, too_large
from .static import LIBRARIES

GPUS = (2, 4, 8, 16, 32, 64)  #: numbers of GPUs that an error suggests
TOKENS = 64  #: the shortest `max_length` that an error suggests
#: Candidate limits in tokens for joined micro-batches; larger ones do not speed up any GPU.
TOGETHER = (4096, 8192, 16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory that a run may use.

    Attributes:
        card: the GPU; ``None`` for the CPU.
        budget: bytes that the tensors of the run may take; ``None`` for all that a plan may use
            on a GPU, and for no limit on the CPU.
        host: bytes of host memory for offloaded layer inputs; ``None`` if unknown.
    """

    card: Card | None = None
    budget: int | None = None
    host: int | None = None

    @property
    def limited(self) -> bool:
        """Whether there is a memory limit."""
        return self.card is not None or self.budget is not None


def room_of(device: torch.device) -> Room:
    """Return the memory that is free on a device now, including unused blocks of torch."""
    if device.type != "cuda":
        return Room()
    properties = torch.cuda.get_device_properties(device)
    card = replace(
        card_of(properties.name, properties.total_memory), memory=properties.total_memory
    )
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    # Memory of libraries is a term of the plan; other allocated memory is not free.
    return Room(
        card=card,
        budget=min(card.budget, int(free * (1 - FRAGMENTS)) + min(allocated, LIBRARIES)),
        host=_host_budget(device),
    )


def _host_budget(device: torch.device) -> int | None:
    """Return available host memory, including blocks that this process has pinned already."""
    free = available()
    return None if free is None else free + OffloadedInput.pool(device).nbytes


def plan_run(
    identified: Identified,
    settings: Settings,
    packs: Packs,
    room: Room,
    *,
    backends: Chosen | None = None,
    before: PreviousPlan | None = None,
    join: Callable[[int], Packs] | None = None,
    ranks: Ranks | None = None,
) -> tuple[RunPlan, list[str]]:
    """Plan a run and choose its policies.

    Args:
        identified: the model; its headers are enough.
        settings: settings of the run; a policy that they name is used.
        packs: the packs of the run's rows.
        room: the memory that the run may use.
        backends: the kernel backends that the run has chosen.
        before: the plan before the run was stopped; it is used again if it fits.
        join: returns the packs if micro-batches are joined up to a number of tokens; by default
            none are joined.
        ranks: the ranks of the run, if there are several; `room` is the least of any.

    Returns:
        The plan, and notes for the user, one line each.

    Raises:
        InputError: ``QC-PLAN-001`` the run does not fit, and the settings do not name a policy;
            ``-006`` offload needs more host memory than is available.
        UsageError: ``QC-PLAN-005`` a pack has more tokens than kernels can index.
    """
    for pack in packs.largest:
        check_pack(pack)
    planner = Planner(
        identified, settings, room.card, backends=backends, budget=room.budget, host=room.host
    )
    planner, reason = _placed(planner, packs, ranks, room)
    by_hand = settings.recompute != "auto" or not settings.gradient_checkpointing
    before = before or PreviousPlan()
    packs, notes = _packs(planner, packs, join, before, room)
    policies, more_notes = _policies(planner, packs, room, before.policies)
    notes += more_notes
    worst = _worst_plan(planner, packs, policies)
    usual = planner.plan(packs.usual, policies, packs.micro_steps)
    plan = RunPlan(
        worst=worst, usual=usual, micro_steps=packs.micro_steps, together=packs.together,
        by_hand=by_hand, limited=room.limited,
        shared=None if ranks is None else planner.shared(usual, packs.packs, packs.load, reason),
    )  # fmt: skip
    if not worst.fits_host:
        raise _host_memory_refusal(worst, planner, packs)
    if room.limited and not worst.fits:
        error = refusal(worst, planner, packs, by_hand=by_hand)
        if not by_hand:
            raise error
        notes.append(f"warning: {error.code} {error.message}; {error.fix}")
    # On the CPU the plan's line already contains what its notes say.
    return plan, [*notes, *_shared_notes(plan), *(() if room.card is None else worst.notes)]


def _shared_notes(plan: RunPlan) -> list[str]:
    """Return why the base is sharded or whole, and what the ranks exchange."""
    shared = plan.shared
    if shared is None:
        return []
    timed = shared.usual.timed
    return [f"{shared.reason}; {shared.communication()}" if timed else shared.reason]


def _placed(planner: Planner, packs: Packs, ranks: Ranks | None, room: Room) -> tuple[Planner, str]:
    """Decide whether each rank holds the whole base or a shard of it.

    Args:
        planner: the planner of one GPU.
        packs: the packs of the run.
        ranks: the ranks of the run; ``None`` for one process.
        room: the least memory of any rank.

    Returns:
        The planner of a rank, and the reason for users.
    """
    if ranks is None:
        return planner, ""
    whole, wanted = planner.over(ranks, sharded=False), planner.settings.shard_base
    if wanted != "auto":
        return planner.over(ranks, sharded=wanted == "always"), asked_for(wanted == "always")
    worst = _worst_plan(whole, packs, whole.fastest(*packs.largest).policies)
    if not room.limited or worst.peak <= worst.budget:
        return whole, FITS
    return planner.over(ranks, sharded=True), too_large(worst)


def _packs(
    planner: Planner,
    packs: Packs,
    join: Callable[[int], Packs] | None,
    before: PreviousPlan,
    room: Room,
) -> tuple[Packs, list[str]]:
    """Choose how micro-batches are joined: as before the stop if it fits, else the fastest."""
    if join is None:
        return packs, []
    if before.together is not None:
        same = join(before.together) if before.together else packs
        policies = before.policies or planner.fastest(*same.largest).policies
        if not room.limited or _fits(planner, same, policies):
            return same, []
    joined = _joined(planner, packs, join) if planner.timed else packs
    if before.together is None or before.together == joined.together:
        return joined, []
    return joined, [
        f"micro-batches were joined up to {before.together} tokens before the run was stopped, "
        f"which does not fit now: up to {joined.together} from here on, which sums in another order"
    ]


def _fits(planner: Planner, packs: Packs, policies: tuple[str, ...]) -> bool:
    """Whether the packs fit under these policies or others that the settings allow."""
    known = len(policies) == len(planner.measure.kinds) and set(policies) <= set(planner.allowed())
    if known and _worst_plan(planner, packs, policies).fits:
        return True
    return _worst_plan(planner, packs, planner.fastest(*packs.largest).policies).fits


def _joined(planner: Planner, packs: Packs, join: Callable[[int], Packs]) -> Packs:
    """Return the packs whose optimizer steps are fastest; short micro-steps wait for the host.

    Joining up to the size of the largest micro-batch takes no more memory; larger limits may and
    are tried too.
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
    """Return the time of an optimizer step under the fastest policies that fit, else infinity."""
    policies = planner.fastest(*packs.largest).policies
    if not _worst_plan(planner, packs, policies).fits:
        return math.inf
    return planner.plan(packs.usual, policies, packs.micro_steps).seconds * packs.micro_steps


def _policies(
    planner: Planner, packs: Packs, room: Room, previous: tuple[str, ...]
) -> tuple[tuple[str, ...], list[str]]:
    """Choose the policy of each layer: those before the stop if they fit, else the fastest."""
    layers = len(planner.measure.kinds)
    if not set(previous) <= set(planner.allowed()):
        previous = ()  # the settings name another policy
    if len(previous) == layers and (not room.limited or _worst_plan(planner, packs, previous).fits):
        return previous, [f"recompute as before the run was stopped: {spelled(previous)}"]
    if room.limited:
        chosen = planner.fastest(*packs.largest).policies
    else:
        chosen = (default_policy(planner.settings),) * layers
    if previous and previous != chosen:
        return chosen, [
            f"recompute was {spelled(previous)} before the run was stopped, which does not fit "
            f"now: {spelled(chosen)} from here on, which computes the same numbers"
        ]
    return chosen, []


def _worst_plan(planner: Planner, packs: Packs, policies: tuple[str, ...]) -> Plan:
    """Return the plan of the run's peak, which may be in a step or in an evaluation."""
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
    """Return ``QC-PLAN-001`` for a plan that does not fit, with changes that would make it fit.

    Args:
        plan: the plan that does not fit.
        planner: the planner that made it.
        packs: the packs of the run; by default the pack of the plan.
        by_hand: whether the settings name the policy, so that another may fit.
    """
    return InputError(
        "QC-PLAN-001",
        "does not fit in the memory of the GPU",
        field="max_length",
        found=f"{plan.pack} under recompute {plan.recompute} take {plan.peak / 1e9:.3g} GB "
        f"({plan.moment}), most of it {plan.largest}"
        + (f", the base sharded over {planner.ranks.size} GPUs" if planner.sharding else ""),
        expected=f"at most {plan.budget / 1e9:.3g} GB",
        fix=" or ".join(_fixes(plan, planner, packs or _packs_of_plan(plan), by_hand))
        or "use a GPU with more memory, a smaller model, or fewer target_groups"
        + (", or rows with smaller media" if plan.units else ""),
    )


def _host_memory_refusal(plan: Plan, planner: Planner, packs: Packs) -> InputError:
    """Return ``QC-PLAN-006``, also if the settings name the policy: pinning too much is fatal."""
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
    """Return changes that make the run fit, the smallest first; each of them was planned."""
    fixes = []
    if by_hand:
        any_policy = planner.with_any_policy()
        other = _worst_plan(any_policy, packs, any_policy.fastest(*packs.largest).policies)
        if other.fits:
            fixes.append(f"with recompute=auto ({other.recompute}) it fits")
    if (rows := _rows(planner, packs)) > 0:
        fixes.append(f"with per_device_train_batch_size {rows} it fits")
    units = max((packs.held_out_units, *packs.most_units))
    longest = max(*packs.longest_rows, packs.held_out)
    if TOKENS <= (tokens := planner.longest(units=units)) < longest:
        batch_size = "per_device_train_batch_size 1 and " if len(packs.longest_rows) > 1 else ""
        fixes.append(f"with {batch_size}max_length {tokens} it fits")
    if (gpus := _gpus(planner, packs)) > 0:
        fixes.append(f"on {gpus} GPUs with the base sharded over them it fits")
    return fixes


def _gpus(planner: Planner, packs: Packs) -> int:
    """Return the smallest power of two of more GPUs on which the run fits; 0 if none does."""
    if planner.device != "cuda" or planner.settings.shard_base == "never":
        return 0
    for number in GPUS:
        if number > planner.ranks.size:
            ranks = Ranks(gpus=number, link=planner.card.link)
            more = planner.over(ranks, sharded=True)
            if _worst_plan(more, packs, more.fastest(*packs.largest).policies).fits:
                return number
    return 0


def _rows(planner: Planner, packs: Packs) -> int:
    """Return the largest smaller micro-batch that fits with any rows; 0 if none does."""
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
