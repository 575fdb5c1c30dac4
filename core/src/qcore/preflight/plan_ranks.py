"""The step that `qcore plan` plans: the micro-batch, and whether several GPUs hold the whole base.

This file decides the rows of a step, that every GPU holds the whole base if that fits, and that the
base is sharded otherwise. What a step then takes is up to `planning`.
"""

from __future__ import annotations

from ..config.settings import Settings
from ..data.sampler import rows_per_step
from ..planning import Planner
from ..planning.links import NCCL, Ranks
from ..planning.report import Pack, Plan
from ..planning.shared import FITS, SharedStep, asked_for, too_large


def best(planner: Planner, settings: Settings, units: int, *, fixed: bool) -> Plan:
    """Plan a micro-step of one GPU.

    Args:
        planner: for the GPU.
        settings: of the run.
        units: media units of each row.
        fixed: whether a micro-batch has `per_device_train_batch_size` rows; otherwise as many as
            are fastest.
    """
    size = settings.per_device_train_batch_size
    if fixed:
        return planner.fastest(Pack((settings.max_length,) * size, units * size))
    return planner.best(settings.max_length, _rows(planner, settings), units)


def of_ranks(
    planner: Planner, settings: Settings, units: int, ranks: Ranks, *, fixed: bool
) -> tuple[Planner, Plan, SharedStep]:
    """Plan a step that several GPUs share.

    Args:
        planner: for one GPU.
        settings: of the run.
        units: media units of each row.
        ranks: the GPUs and their links.
        fixed: as in `best`.

    Returns:
        The planner of a rank, the plan of its micro-step, and the step of all ranks.
    """
    planner = planner.on(planner.card, max(0, planner.budget - NCCL))
    placed, reason = planner.over(ranks, sharded=settings.shard_base == "always"), FITS
    plan = best(placed, settings, units, fixed=fixed)
    if settings.shard_base != "auto":
        reason = asked_for(settings.shard_base == "always")
    elif plan.peak > plan.budget:
        reason = too_large(plan)
        placed = planner.over(ranks, sharded=True)
        plan = best(placed, settings, units, fixed=fixed)
    packs = -(-_rows(placed, settings) // len(plan.lengths))
    return placed, plan, placed.shared(plan, packs, -(-packs // ranks.size), reason)


def _rows(planner: Planner, settings: Settings) -> int:
    """Rows of a step of `max_length` tokens, over all ranks."""
    return rows_per_step(settings) * (planner.ranks.size if settings.scale_batch else 1)
