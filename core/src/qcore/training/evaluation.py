"""The evaluation: mean loss per supervised token over the held-out rows.

This file decides that each row is evaluated alone, and that several ranks share the rows and sum
their losses in the order of the rows, so that the result does not depend on the number of ranks.
When an evaluation is due is up to `step.Loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from ..data.dataset import Dataset
from ..data.microbatches import cost, spread
from ..data.rendering.masking import Example
from ..parallel.agreement import together
from ..parallel.world import World
from .step_checks import bad_evaluation


def mean_loss(
    data: Dataset,
    loss: Callable[[Example], float],
    world: World,
    alone: Callable[[], AbstractContextManager[None]],
    between: Callable[[], None] | None = None,
    finish: Callable[[int], None] | None = None,
) -> float:
    """Evaluate the held-out rows; there is at least one.

    Args:
        data: the rows.
        loss: the sum of the loss over a row.
        world: the ranks that share the rows.
        alone: context of what a rank computes by itself.
        between: called before each row.
        finish: called after the rows, or an error, with the rows of the rank that has the most.

    Raises:
        NumericError: ``QC-TRAIN-012`` the loss of a row is not finite.
    """
    lengths, supervised = data.eval.lengths, int(data.eval.column("supervised").sum())
    own: dict[int, float] = {}
    everyone = spread([cost([n]) for n in lengths], world.size)
    with together(world), ExitStack() as stack:
        if finish is not None:
            stack.callback(finish, max(map(len, everyone)))
        stack.enter_context(alone())
        for number in everyone[world.rank]:
            if between is not None:
                between()
            example = data.eval[number]
            own[number] = value = loss(example)
            if not math.isfinite(value):
                raise bad_evaluation(data.place([example]), value)
    values = dict(pair for pairs in world.gather([*own.items()]) for pair in pairs)
    total = 0.0
    for number in range(len(values)):  # not `sum`, which rounds otherwise since Python 3.12
        total += values[number]
    return total / supervised
