"""Proof that training moved every adapter away from where it started.

This file decides what counts as moved: B, judged against zero or against the initial adapter.

Code: ``QC-TRAIN-004``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import NumericError
from ..nn.model import Model
from ..nn.qlora.lora_layer import LoraLayer


def prove_moved(
    model: Model, optimizer: torch.optim.Optimizer, start: Mapping[str, Tensor] | None = None
) -> tuple[int, int]:
    """Check that every adapter's B moved from where it started: training had an effect on it.

    Args:
        model: with adapters.
        optimizer: AdamW.
        start: B of each weight in the initial adapter; ``None``: zero.

    Returns:
        How many linear maps moved, and of how many. Of a stack of experts, one that no token
        was routed to does not move.

    Raises:
        NumericError: ``QC-TRAIN-004``.
    """
    moved = {
        name: module.moved if start is None else _moved_from(optimizer, start[name], module)
        for name, module in model.adapters()
    }
    still = [name for name, (count, _) in moved.items() if not count]
    if still:
        raise NumericError(
            "QC-TRAIN-004",
            f"{len(still)} adapters never moved",
            field=still[0],
            found="lora_B all zero" if start is None else "lora_B as in the initial adapter",
            fix="raise learning_rate or max_steps, or leave the group out of target_groups",
        )
    return sum(count for count, _ in moved.values()), sum(n for _, n in moved.values())


def _moved_from(
    optimizer: torch.optim.Optimizer, start: Tensor, module: LoraLayer
) -> tuple[int, int]:
    """How many linear maps moved away from `start`, and of how many.

    Weight decay moves a B that is not zero without any gradient, so its second moment must
    show that there was one.
    """
    assert module.lora_B is not None
    b = module.lora_B.detach()
    squares = optimizer.state[module.lora_B]["exp_avg_sq"]
    moved = module.touched(b != start.to(b.device)) & module.touched(squares)
    return int(moved.sum()), len(moved)
