"""The planner: predicts memory and time of a training step, and of a run with its own rows.

Modules, from the bottom up:

    links        links between GPUs, ranks, and the time of a collective
    gpus         GPU specifications, and the time of an op
    report       the plan of a step, for people and programs
    segments     memory and work of a segment of a step, extrapolated to long packs
    trace        allocations and work of a segment, recorded at the dispatcher
    meta_model   the model on the meta device, stored as it will be loaded
    runner       runs one segment on the meta device
    measure      runs each segment of the trunk once, forward and backward
    tower        the same for a vision tower
    packs        which packs of a run's rows are planned
    host_memory  pinned host memory for offloaded layer inputs
    static       bytes that are always allocated, by term
    sharding     a base sharded over ranks: bytes of a rank, and what gathering costs
    step         segments combined: peak memory and time under given policies
    policies     the policy if no limit is known
    planner      chooses the policies, the micro-batch and the longest row
    run          the plan of a run, and the error if it does not fit
    compare      plan and measurement compared
    saved        the plan in the run's folder, for a resumed run
    oom          the report when memory runs out despite the plan

Importing the package imports no torch; `Planner` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .report import Plan

if TYPE_CHECKING:
    from .planner import Planner

__all__ = ["Plan", "Planner"]


def __getattr__(name: str) -> Any:
    if name == "Planner":
        from .planner import Planner

        return Planner
    raise AttributeError(f"module {__name__} has no attribute {name}")
