"""Reference of weighted SwiGLU, for routed experts and the shared expert.

This file decides that the routing weight multiplies the input of an expert's last layer (which is
linear): the gradient of the weight then needs only saved tensors, and the layer's output is never
saved. Everything is computed in float32 and rounded once.

Shapes: R rows, T tokens, k experts per token, I an expert's inner size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcore.ops import Routing


def weighted_up(gate_up: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """``w silu(gate) up``: ``[R, 2 I] -> [R, I]``, rows sorted by expert.

    Args:
        gate_up: gate columns, then up columns.
        weights: ``[T, k]``, routing weights of each token's experts.
        routing: the rows of each token.
    """
    out: Tensor = _WeightedUp.apply(gate_up, weights, routing)  # type: ignore[no-untyped-call]
    return out


def shared_up(gate: Tensor, up: Tensor, score: Tensor) -> Tensor:
    """``sigmoid(score) silu(gate) up``: ``[T, I], [T, I], [T, 1] -> [T, I]``."""
    out: Tensor = _SharedUp.apply(gate, up, score)  # type: ignore[no-untyped-call]
    return out


class _WeightedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        routing.save(ctx, gate_up, weights)
        gate, up = wide(gate_up).chunk(2, -1)
        rows = wide(weights).flatten().index_select(0, routing.order)
        return F.silu(gate).mul_(up).mul_(rows[:, None]).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        routing, (gate_up, weights) = Routing.saved(ctx)
        rows = wide(weights).flatten().index_select(0, routing.order)
        gate, up = wide(gate_up).chunk(2, -1)
        dgate, dup, drows = _backward(wide(dy), gate, up, rows[:, None])
        dweights = drows.flatten().index_select(0, routing.inverse).view_as(weights)
        return torch.cat([dgate, dup], -1).to(gate_up.dtype), dweights.to(weights.dtype), None


class _SharedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, score: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, score)
        weight = torch.sigmoid(wide(score))
        return F.silu(wide(gate)).mul_(wide(up)).mul_(weight).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, score = ctx.saved_tensors
        weight = torch.sigmoid(wide(score))
        dgate, dup, dweight = _backward(wide(dy), wide(gate), wide(up), weight)
        dscore = dweight * weight * (1 - weight)
        return dgate.to(gate.dtype), dup.to(up.dtype), dscore.to(score.dtype)


def _backward(
    dy: Tensor, gate: Tensor, up: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up ``[R, I]`` and of the weight ``[R, 1]``."""
    opened = F.silu(gate)
    dweight = (dy * opened * up).sum(-1, keepdim=True)
    dy = dy * weight
    return torch.ops.aten.silu_backward(dy * up, gate), dy * opened, dweight


def wide(x: Tensor) -> Tensor:
    """Cast to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
