"""The plan in the folder of a run, so that a resumed run uses the same policies.

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
    """The policies of a run before it was stopped.

    Attributes:
        policies: of each layer; none: not known, or the settings ask for others.
        together: what micro-batches ran together up to, 0 where each ran alone; ``None``: not
            known.
    """

    policies: tuple[str, ...] = ()
    together: int | None = None


def save_plan(folder: Path, plan: RunPlan) -> None:
    """Write the plan, whole or not at all.

    Raises:
        WriteError: ``QC-WRITE-003`` to ``-006``.
    """
    values = {
        "policies": list(plan.policies), "together": plan.together, "plan": plan.as_json(),
    }  # fmt: skip
    rewrite(folder / PLAN, [(json.dumps(values, indent=1) + "\n").encode()])


def load_plan(folder: Path, known: Collection[str]) -> tuple[PreviousPlan, list[str]]:
    """What `keep` wrote, nothing where there is nothing, and what to tell of it.

    Args:
        folder: the run's.
        known: the policies that there are; a plan that names another is damaged.

    Raises:
        InputError: ``QC-READ-001``.
    """
    path = folder / PLAN
    try:
        with reading(path):
            values = json.loads(path.read_text(encoding="utf-8") if path.exists() else "{}")
        policies, together = values.get("policies", []), values.get("together", 0)
        if policies:
            if not isinstance(policies, list) or not set(policies) <= set(known):
                raise ValueError("no policies")
            if type(together) is not int or together < 0:
                raise ValueError("no tokens")
            return PreviousPlan(policies=tuple(policies), together=together), []
    except (ValueError, AttributeError, TypeError):
        return PreviousPlan(), [f"{path} is damaged: recompute is planned again"]
    return PreviousPlan(), [f"{path.parent.name} holds no plan: recompute is planned again"]
