"""What a rank trains in a case: model, adapters, rows, and what the planner expects of them.

Nothing here computes: the model is built as `train` builds it and stepped by its own `Loop`. Rows
are the same on all ranks and in every placement, so that losses can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from peers.qcore_side import architecture, describe, rows
from peers.shapes import ALPHA, RANK

from qcore.adapter.targets import lora_targets
from qcore.config.frozen_map import Entries
from qcore.config.settings import Settings
from qcore.nn.kernels.registry import Chosen
from qcore.nn.model import Model
from qcore.nn.sharding.base import ShardedBase
from qcore.parallel.world import World
from qcore.planning import Planner
from qcore.planning.links import NCCL, Ranks
from qcore.planning.report import spelled
from qcore.planning.run import room_of
from qcore.plugins.manager import Plugins
from qcore.plugins.resolve_model import Identified, classes_of
from qcore.training.step import Loop

from .base import RandomBase, seed_of
from .cases import Case


def settings_of(case: Case, packs: int, steps: int, *, clip: float = 1.0) -> Settings:
    """Settings of a run whose steps have `packs` micro-batches of the case's rows."""
    groups: tuple[str, ...] = ("attn", "gdn", "shared_expert") if case.job.moe else ()
    groups += ("experts",) if case.expert_rank else ()
    ranks = {"experts": case.expert_rank} if case.expert_rank else {}
    return Settings(
        max_steps=steps, per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=packs, max_length=max(2, case.seq), learning_rate=1e-4,
        warmup_ratio=0.0, r=RANK, lora_alpha=ALPHA, target_groups=groups, max_grad_norm=clip,
        join_micro_batches=False, group_r=Entries(ranks),
    )  # fmt: skip


def build(
    case: Case,
    chosen: Chosen,
    random: RandomBase,
    *,
    dtype: torch.dtype = torch.bfloat16,
    world: World | None = None,
) -> Model:
    """The model with random weights; its adapters have no values yet (`reset`).

    Args:
        case: the sizes.
        chosen: backends.
        random: the weights, and the device.
        dtype: of the run.
        world: ranks that the layers are sharded over; ``None``: this process holds all.
    """
    config, layout = describe(case.job)
    lora = lora_targets(layout, settings_of(case, 1, 1), classes_of(config))
    model = Model(architecture(case.job), config, layout, dtype, lora, chosen)
    if world is not None:
        model.sharded = ShardedBase(model, layout, world, random.device, quantize=True)
    random.fill(layout, model)
    return model


def reset(model: Model, device: torch.device, *, b: float = 0.0) -> None:
    """Fresh adapters, equal on all ranks: A uniform as PEFT draws it, B normal of deviation `b`."""
    for name, module in model.adapters():
        assert module.lora is not None
        generator = torch.Generator(device).manual_seed(seed_of(name, 0))
        first, second = (
            torch.empty(shape, device=device) for shape in module.lora_shapes(module.lora.r)
        )
        bound = 1 / math.sqrt(first.shape[1])
        first.uniform_(-bound, bound, generator=generator)
        second.zero_()
        if b:
            second.normal_(0, b, generator=generator)
        module.set_lora(first, second, trained=True)


def loop_of(
    case: Case,
    model: Model,
    device: torch.device,
    policies: Sequence[str],
    *,
    packs: int,
    every: int,
    steps: int,
    world: World,
    clip: float = 1.0,
) -> Loop:
    """A training loop whose steps have `packs` micro-batches, shared by the ranks of `world`.

    Args:
        case: rows of a micro-batch.
        model: with adapters.
        device: where it is.
        policies: activation checkpointing of each layer.
        packs: micro-batches of a step.
        every: micro-batches of a step that rows are drawn for; fewer packs take the first of them.
        steps: of the run.
        world: the ranks.
        clip: largest norm of the gradient; 0: any.
    """
    generator = torch.Generator().manual_seed(1)
    most = max(2, case.job.text["vocab_size"] - 320)
    ids = torch.randint(0, most, (steps, every * case.batch, case.seq), generator=generator)
    settings = settings_of(case, packs, steps, clip=clip)
    data = rows(ids[:, : packs * case.batch], settings)
    return Loop(model, data, settings, device, recompute=tuple(policies), world=world)


class Plans:
    """What the planner expects of a case in each placement.

    Args:
        case: the model and its rows.
        chosen: backends.
        device: whose memory is the budget; on the CPU there is none.
    """

    def __init__(self, case: Case, chosen: Chosen, device: torch.device) -> None:
        config, layout = describe(case.job)
        found = SimpleNamespace(
            layout=layout,
            checkpoint=SimpleNamespace(config=config),
            decision=SimpleNamespace(architecture=architecture(case.job)),
            plugins=Plugins.discover().for_model_type("qwen3_5"),
            modality=None,
        )
        room = room_of(device)
        self._planner = Planner(
            cast(Identified, found), settings_of(case, 1, 1), room.card,
            backends=chosen, budget=room.budget, host=room.host,
        )  # fmt: skip
        self._case = case

    def of(
        self, placement: str, ranks: int, policies: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """The plan of a rank's micro-batch.

        Args:
            placement: of the weights.
            ranks: how many there are.
            policies: of the layers; ``None``: those of the case.
        """
        planner = self._planner
        if placement != "one":
            planner = planner.over(Ranks(gpus=ranks), sharded=placement == "sharded")
            planner.budget -= NCCL
        lengths = (self._case.seq,) * self._case.batch
        if policies is None and self._case.policy:
            policies = (self._case.policy,) * self._case.count
        plan = planner.plan(lengths, policies) if policies else planner.fastest(lengths)
        return {
            "policies": list(plan.policies), "policy": spelled(plan.policies), "fits": plan.fits,
            "plan_bytes": plan.peak, "plan_seconds": plan.seconds if plan.timed else None,
            "moment": plan.moment, "terms": dict(plan.memory),
        }  # fmt: skip
