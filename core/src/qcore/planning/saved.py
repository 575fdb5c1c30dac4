"""Stores a run's plan in ``OUTPUT.run/plan.json``, from which a resumed run takes its policies.

This file decides the content of ``OUTPUT.run/plan.json``: the policy of each layer, and the plan
for people. It is not part of a checkpoint: all policies compute the same numbers, so a run may
resume under another one, and reports it. It imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..io.atomic import reading, rewrite
from .compare import RunPlan

PLAN = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviousPlan:
    """What the plan of a run decided before the run was stopped.

    Attributes:
        policies: policy of each layer; empty if unknown, or if the settings ask for others.
        together: the most tokens of joined micro-batches, 0 if none were joined; ``None`` if
            unknown.
    """

    policies: tuple[str, ...] = ()
    together: int | None = None


def save_plan(folder: Path, plan: RunPlan) -> None:
    """Write the plan atomically.

    Args:
        folder: the run folder.
        plan: the plan of the run.

    Raises:
        WriteError: ``QC-WRITE-003`` to ``-006`` the system refused the write.
    """
    values = {
        "policies": list(plan.policies), "together": plan.together, "plan": plan.as_json(),
    }  # fmt: skip
    rewrite(folder / PLAN, [(json.dumps(values, indent=1) + "\n").encode()])


def load_plan(folder: Path, known: Collection[str]) -> tuple[PreviousPlan, list[str]]:
    """Read the plan that `save_plan` wrote.

    Args:
        folder: the run folder.
        known: names of all policies; a plan that names another is damaged.

    Returns:
        The plan, empty if it is missing or damaged, and lines for the user about that.

    Raises:
        InputError: ``QC-READ-001`` the file cannot be read.
    """
    path = folder / PLAN
    try:
        with reading(path):
            values = json.loads(path.read_text(encoding="utf-8") if path.exists() else "{}")
        policies, together = values.get("policies", []), values.get("together", 0)
        if policies:
            if not isinstance(policies, list) or not set(policies) <= set(known):
                raise ValueError("not policies")
            if type(together) is not int or together < 0:
                raise ValueError("not a number of tokens")
            return PreviousPlan(policies=tuple(policies), together=together), []
    except (ValueError, AttributeError, TypeError):
        return PreviousPlan(), [f"{path} is damaged: recompute is planned again"]
    return PreviousPlan(), [f"{path.parent.name} has no plan: recompute is planned again"]
