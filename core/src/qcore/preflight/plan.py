"""`qcore plan`: memory, micro-batch and speed of training, from config and headers alone.

This file decides which GPUs and which micro-batch are planned, whether the tower is part
of the plan, and what the report holds. The plan of one step is made in `planning`, and several GPUs
in `qcore.preflight.plan_ranks`, which this file imports late: names and settings are checked before
torch is loaded.

Codes: ``QC-PLAN-007`` media for a model of which nothing reads media, ``-008`` media that do not
fit in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config.settings import Settings
from ..errors import UsageError
from ..io.stop_signals import importing
from ..planning.gpus import CARDS, cap_budgets, gpu_by_name, parse_budget
from ..planning.links import Ranks, parse_ranks
from ..planning.report import Plan
from ..planning.shared import SharedStep
from ..plugins.resolve_model import Identified, identify
from .checks import preflight
from .modality import with_tower

if TYPE_CHECKING:
    from ..planning import Planner


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPlan:
    """The plan for one GPU.

    Attributes:
        plan: of one step.
        longest_row: tokens of the longest row that fits alone.
        longest_row_recompute: the activation checkpointing policy of that row.
        fix: what would fit; ``None`` where the plan fits.
        shared: the step of all GPUs, where several were asked for.
    """

    plan: Plan
    longest_row: int
    longest_row_recompute: str
    fix: str | None = None
    shared: SharedStep | None = None

    def as_json(self) -> dict[str, Any]:
        """The plan as ``qcore plan --json`` prints it."""
        return self.plan.as_json() | {
            "longest_row": self.longest_row,
            "longest_row_recompute": self.longest_row_recompute,
            **({"ranks": self.shared.as_json()} if self.shared else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """The result of `plan`.

    Attributes:
        model: as the user named it.
        trained_parameters: parameters of all adapters.
        media_units: units of media in each row; 0 for text.
        notes: what preflight reports, and budgets that are larger than a GPU.
        plans: one for each GPU.
    """

    model: str
    trained_parameters: int
    media_units: int
    notes: tuple[str, ...]
    plans: tuple[GpuPlan, ...]

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore plan --json``."""
        return {
            "model": self.model,
            "trained_parameters": self.trained_parameters,
            "notes": list(self.notes),
            "plans": [plan.as_json() for plan in self.plans],
        }


def plan(
    model: str,
    settings: Settings | None = None,
    *,
    gpus: Sequence[str] = (),
    budget: str = "auto",
    media: int | None = None,
    fixed_rows: bool = False,
    gpu_count: int | None = None,
    nodes: int | None = None,
    link: float | None = None,
    network: float | None = None,
) -> PlanReport:
    """Predict what training takes, before a weight is read.

    Args:
        model: a folder or a hub id; the weights of a hub id stay on the hub.
        settings: of the run; every row is taken to have `max_length` tokens. By default the
            defaults of `Settings`.
        gpus: names of GPUs; by default all that are known.
        budget: memory that may be filled, in GB, or ``auto``.
        media: units that the tower computes for each row; ``None`` for rows of text.
        fixed_rows: plan `per_device_train_batch_size` rows in a micro-batch, not the number
            that is fastest.
        gpu_count: GPUs of each machine, which share the rows of a step; by default one.
        nodes: machines; by default one.
        link: GB/s between two GPUs of a machine; by default that of the kind of GPU.
        network: GB/s between two machines; by default 10.

    Raises:
        UsageError: ``QC-PLAN-002`` to ``-010``; what preflight refuses.
        QcoreError: see docs/errors.md.
    """
    settings = settings or Settings()
    cards = list(dict.fromkeys(map(gpu_by_name, gpus))) or list(CARDS)
    budgets, capping = cap_budgets(cards, parse_budget(budget))
    ranks = [parse_ranks(card.link, gpu_count, nodes, link, network) for card in cards]
    identified = identify(model, generation=settings.generation, headers_only=True)
    identified = identified.quantizing(settings.quantize_groups)
    identified = _with_media(identified, settings, media)
    notes = (
        *preflight(identified, verb="plan", settings=settings),
        *(f"note: {line}" for line in capping),
    )
    with importing():
        from ..planning import Planner

    planner = Planner(identified, settings, cards[0])
    units = _units(planner, settings, media)
    each = [planner.on(card, limit) for card, limit in zip(cards, budgets)]
    return PlanReport(
        model=model,
        trained_parameters=planner.trained,
        media_units=units,
        notes=notes,
        plans=tuple(
            _gpu_plan(one, settings, units, of_card, fixed=fixed_rows)
            for one, of_card in zip(each, ranks, strict=True)
        ),
    )


def _with_media(identified: Identified, settings: Settings, media: int | None) -> Identified:
    """The model as a run loads it: with its tower if rows have media.

    Raises:
        UsageError: ``QC-PLAN-007``; what `with_tower` raises.
    """
    modality = identified.modality
    if media is not None and modality is None:
        raise UsageError(
            "QC-PLAN-007",
            "nothing that is installed reads media for this model",
            field="--media",
            found=media,
            fix="leave --media out, or install the plugin of its modality",
        )
    kinds = () if modality is None or media is None else modality.kinds
    identified, _ = with_tower(
        identified, settings.target_groups, kinds, quantized=settings.quantize_groups,
        fix="leave the group out, or pass --media UNITS",
    )  # fmt: skip
    return identified


def _units(planner: Planner, settings: Settings, media: int | None) -> int:
    """Units of media in a row; the tokens that stand for them are among the row's.

    Raises:
        UsageError: ``QC-PLAN-008``.
    """
    from ..data.microbatches import extent
    from ..planning.packs import MOST

    if media is None:
        return 0
    if media < 1:
        raise UsageError(
            "QC-PLAN-008",
            "is not a number of units",
            field="--media",
            found=media,
            expected="at least 1",
            fix="leave --media out for rows of text",
        )
    # Checked before units are turned into tokens, which takes memory for each unit.
    if media > (most := MOST - extent([settings.max_length])):
        raise UsageError(
            "QC-PLAN-008",
            "is more than kernels can index in a row",
            field="--media",
            found=f"{media} units beside {settings.max_length} tokens",
            expected=f"at most {max(most, 0)}",
            fix="take fewer or smaller media in a row",
        )
    if (tokens := planner.tokens(media)) > settings.max_length:
        raise UsageError(
            "QC-PLAN-008",
            "is more than a row can hold",
            field="--media",
            found=f"{media} units, which are {tokens} tokens",
            expected=f"at most {settings.max_length} tokens",
            fix=f"pass --max-length {tokens} or more",
        )
    return media


def _gpu_plan(
    planner: Planner, settings: Settings, units: int, ranks: Ranks, *, fixed: bool
) -> GpuPlan:
    from ..planning.run import refusal
    from .plan_ranks import best, of_ranks

    shared = None
    if ranks.size == 1:
        step = best(planner, settings, units, fixed=fixed)
    else:
        planner, step, shared = of_ranks(planner, settings, units, ranks, fixed=fixed)
    return GpuPlan(
        plan=step,
        longest_row=planner.longest(units=units),
        longest_row_recompute=planner.frugal,
        fix=None if step.fits else refusal(step, planner).fix,
        shared=shared,
    )
