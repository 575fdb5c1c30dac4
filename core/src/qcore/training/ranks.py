"""What the ranks of a run compare before the first step, and how they share its rows.

This file decides that all ranks plan with the least memory that any of them has, that a rank with
another base, other data, settings, versions or another plan, or that sees another output, is
refused by name of the field, and what `scale_batch` multiplies. How ranks exchange values is up to
`parallel`.

Code: ``QC-PARALLEL-003`` a rank differs from the first one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Final

from ..checkpoint.identity import flat, versions_of
from ..config.settings import Settings
from ..data.sampler import Schedule
from ..parallel.agreement import check_same
from ..parallel.world import World
from ..planning.compare import RunPlan
from ..planning.links import NCCL, PCIE4, Ranks
from ..planning.run import Room
from ..reporting import Reporter
from .checkpoints import RunFiles
from .resume import identity
from .run import Run

#: Libraries that read a model folder or rows; `resume` names those that compute.
_LIBRARIES: Final = ("numpy", "safetensors", "tokenizers", "transformers")


def scaled(settings: Settings, world: World, reporter: Reporter) -> Settings:
    """The settings of a run; ``scale_batch`` multiplies the rows of a step by the ranks."""
    if not settings.scale_batch or world.size == 1:
        return settings
    name = "tokens_per_step" if settings.tokens_per_step else "gradient_accumulation_steps"
    before = getattr(settings, name)
    reporter.note(
        f"scale_batch: {name} is {before} x {world.size} ranks = {before * world.size}; with "
        "another number of ranks a step has other rows"
    )
    more: dict[str, Any] = {name: before * world.size}
    return replace(settings, **more)


def smallest_room(world: World, room: Room) -> Room:
    """The memory that every rank has, less what NCCL will take of a GPU.

    Ranks of one machine share its host memory. NCCL allocates with its first collective, which
    comes after this.
    """
    if world.size == 1:
        return room
    own = [
        None if room.card is None else room.card.memory,
        room.budget, room.host, world.rank - world.local_rank,
    ]  # fmt: skip
    memory, budgets, hosts, machines = zip(*world.gather(own), strict=True)
    host = [None if n is None else n // machines.count(at) for n, at in zip(hosts, machines)]
    least = _least(memory)
    card = None if room.card is None or least is None else replace(room.card, memory=least)
    budget = _least(budgets)
    if card is not None:
        budget = max(0, (card.budget if budget is None else budget) - NCCL)
    return Room(card=card, budget=budget, host=_least(host))


def ranks_of(world: World, room: Room) -> Ranks | None:
    """The ranks as the planner sees them; ``None`` for a process of its own."""
    if world.size == 1:
        return None
    # Machines with different numbers of ranks are planned as if every rank had its own.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or world.size)
    gpus = local if world.size % local == 0 else 1
    link = PCIE4 if room.card is None else room.card.link
    return Ranks(gpus=gpus, nodes=world.size // gpus, link=link)


def _least(sizes: Iterable[int | None]) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def check_ranks(run: Run, plan: RunPlan, files: RunFiles | None = None) -> None:
    """Compare the runs of all ranks.

    Args:
        run: of this rank.
        plan: of this rank.
        files: once the base is loaded: compare its fingerprints.

    Raises:
        InputError: ``QC-PARALLEL-003``.
    """
    if run.world.size == 1:
        return
    if files is not None:
        check_same(run.world, flat({"base": files.identity()["base"]}))
        return
    decided = {
        "policies": [*plan.policies], "together": plan.together, "parked": plan.parked,
        "sharded": plan.sharded,
    }  # fmt: skip
    check_same(
        run.world,
        flat({**identity(run), "libraries": versions_of(_LIBRARIES), "plan": decided}),
    )


def check_output(world: World, **seen: str) -> None:
    """Refuse a rank that sees another output, or another run folder, than the first rank.

    Ranks that go on from different checkpoints would sum the gradients of different steps.

    Raises:
        InputError: ``QC-PARALLEL-003``.
    """
    check_same(world, seen, fix="put --output on a file system that every machine sees")


def note_idle(run: Run, schedule: Schedule) -> None:
    """Warn where a step has fewer micro-batches than ranks: some ranks then compute nothing."""
    packs, ranks = len(schedule.micro_batches(0)), run.world.size
    if packs < ranks:
        run.reporter.warning(
            f"a step has {packs} micro-batches for {ranks} ranks, so that {ranks - packs} of them "
            "compute nothing: lower per_device_train_batch_size, raise "
            "gradient_accumulation_steps, or set scale_batch=true"
        )
