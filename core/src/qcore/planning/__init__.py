"""Will it fit: what a training step takes of a card, and of a run with its own rows.

From the bottom up:

    cards     what cards have, and how long an op takes on one
    record    what a plan says
    segments    a segment of a step, and a long one told from short ones
    trace     what a segment allocates and does, seen at the dispatcher
    meta      the model on the meta device, held as it will be loaded
    measure   each segment run once, forwards and backwards
    packs     which packs of a run's rows are planned
    host      what inputs take that are parked in the host's memory
    step      segments put together: the peak and the time under given policies
    policies  the policy where no limit is known
    planner   the policies, the micro-batch and the longest row to take
    run       the plan of a run, and what becomes of one that is too big
    beside    plan and measurement side by side
    kept      the plan in the run's folder, for a resumed run
    oom       memory that runs out after all

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
