"""How much a layer amplifies rounding in each token, to verify a merge.

A norm of a vector close to 0 amplifies the rounding of what it reads, so float32 summed in another
order moves the outputs of that token more than those of others. This file measures by how much: the
layer runs again on inputs that are moved by a few units in the last place. What most tokens of the
layer move by is an amplification of 1. `qcore.merging.streams` decides the bound that it scales.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .routes import moved, routes

_RUNS = 2
_MOVED = 3e-6  # relative: well above float32's rounding, and small enough to be linear


def amplification(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return how many times more than most tokens each token's output moves ``[T]``, at least 1.

    A token that is sent to other experts moves by that, not by rounding: it counts as 1.

    Args:
        layer: the layer, whose weights are in memory.
        run: runs it on an input ``[T, H]``.
        x: its input ``[T, H]``.
    """
    with routes(layer) as picked:
        out = run(x)
    generator = torch.Generator().manual_seed(0)
    most = out.new_zeros(len(out))
    for _ in range(_RUNS):
        near = x * (1 + _MOVED * torch.randn(x.shape, generator=generator))
        with routes(layer) as again:
            change = run(near) - out
        if out.shape == x.shape:  # of what the layer adds
            change -= near - x
        size = change.abs().amax(1)
        if (elsewhere := moved(picked, again)) is not None:
            size = size.masked_fill(elsewhere, 0)
        most = torch.maximum(most, size)
    usual = most.median().clamp_min(torch.finfo(most.dtype).tiny)
    return (most / usual).nan_to_num(nan=1.0, posinf=1.0).clamp_min(1.0)
