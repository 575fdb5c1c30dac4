"""Checks of a step's parameters and gradients, and the errors that stop a run at a step.

This file decides what is named: the parameter, the adapter without a gradient, the rows of the
step. `step` decides when these checks run.

Codes: ``QC-TRAIN-003`` loss or gradient not finite, ``-012`` the loss of a held-out row is not
finite, ``-015`` a parameter is not finite, ``-016`` an adapter without a gradient, ``-017`` a
spike.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from ..errors import NumericError
from ..nn.model import Model
from ..nn.value_range import is_finite

#: Steps after which every adapter must have had a gradient.
REACHED_BY: Final = 3

Place = tuple[object | None, str]  #: file and rows, as `Dataset.place` returns them


def check_parameters(model: Model, step: int) -> None:
    """Name the first trained parameter that is not finite.

    Args:
        model: the model.
        step: from 0, before its update.

    Raises:
        NumericError: ``QC-TRAIN-015``.
    """
    for name, parameter in model.trainable():
        if not is_finite(parameter.detach()):
            raise NumericError(
                "QC-TRAIN-015",
                f"is not finite before the update of step {step + 1}",
                field=name,
                fix="lower learning_rate; if another step fails in the next run, check the memory "
                "of the device",
            )


def check_reached(model: Model, optimizer: torch.optim.Optimizer, *, media: bool) -> None:
    """Check that every adapter had a gradient in the first steps.

    B counts, not A: A has no gradient in step 1, where B is zero, nor in the first step that
    reaches an expert. Of a stack of experts, one expert is enough.

    Args:
        model: the model.
        optimizer: AdamW, whose second moments are zero only without any gradient.
        media: whether a row of these steps has media; otherwise the tower's adapters are left out.

    Raises:
        NumericError: ``QC-TRAIN-016``.
    """
    tower = frozenset() if media else model.in_tower()
    adapters = [(name, module.lora_B) for name, module in model.adapters() if module not in tower]
    squares = [optimizer.state[b]["exp_avg_sq"] for _, b in adapters if b is not None]
    if not squares:
        return
    largest = torch.stack(torch._foreach_norm(squares, math.inf)).tolist()
    still = [name for (name, _), most in zip(adapters, largest, strict=True) if not most]
    if still:
        raise NumericError(
            "QC-TRAIN-016",
            f"{len(still)} adapters had a gradient of exactly zero in the first {REACHED_BY} steps",
            field=still[0],
            found="no gradient of lora_B",
            expected="a gradient of every adapter that the rows reach",
            fix="look at the weights of the base (constant ones are named while it is loaded), or "
            "leave the group of this weight out of target_groups",
        )


def not_finite(step: int, place: Place, loss: float, norm: float) -> NumericError:
    """The error of a step, from 0, whose loss or gradient is not finite."""
    path, where = place
    return NumericError(
        "QC-TRAIN-003",
        f"the loss or its gradient is not finite at step {step + 1}",
        file=path,
        field=where,
        found=f"loss {loss}, gradient norm {norm}",
        fix="lower learning_rate, or look at these rows",
    )


def bad_evaluation(place: Place, loss: float) -> NumericError:
    """The error of a held-out row whose loss is not finite."""
    path, where = place
    return NumericError(
        "QC-TRAIN-012",
        "the loss of a held-out row is not finite",
        file=path,
        field=where,
        found=f"loss {loss}",
        fix="lower learning_rate, or look at this row",
    )


def spiked(number: int, place: Place, found: str, why: str = "") -> NumericError:
    """The error that stops a run at a spike.

    Args:
        number: of the step, from 1.
        place: its rows.
        found: its values, with those of the steps before.
        why: added to the statement.
    """
    path, where = place
    return NumericError(
        "QC-TRAIN-017",
        f"the loss or its gradient norm rose abruptly at step {number}{why}",
        file=path,
        field=where,
        found=found,
        fix="look at these rows, or go on with --resume and --set on_spike=warn or rollback",
    )
