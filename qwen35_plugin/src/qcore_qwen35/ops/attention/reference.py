"""Reference of the ops around attention: norm and rope of queries and keys, output gate.

This file decides that q_proj's rows are, per head, the query and then the gate, and that
heads are normalized before rotation.

Shapes: T tokens, Hq query heads, Hkv key heads, D head size, n rotating dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...rope import rotate
from ..norm.reference import rms_norm


class AttentionInputs(NamedTuple):
    """q ``[T, Hq, D]``, k and v ``[T, Hkv, D]``, gate ``[T, Hq, D]``.

    v and gate are the projections' outputs, passed through so that their gradients share one buffer
    with the others.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor


def attention_inputs(
    qg: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> AttentionInputs:
    """Compute the inputs of attention and its gate from the projections' outputs.

    Args:
        qg: ``[T, Hq * 2 * D]``: per head the query, then the gate.
        k: ``[T, Hkv * D]``.
        v: ``[T, Hkv * D]``.
        q_weight: ``[D]``, norm weight of queries.
        k_weight: ``[D]``, norm weight of keys.
        eps: epsilon of both norms.
        cos: ``[T, 1, n]``.
        sin: ``[T, 1, n]``.
    """
    d = q_weight.shape[0]
    q, gate = qg.unflatten(-1, (-1, 2 * d)).split(d, -1)
    k, v = k.unflatten(-1, (-1, d)), v.unflatten(-1, (-1, d))
    q = rotate(head_norm(q, q_weight, eps), cos, sin)
    return AttentionInputs(q, rotate(head_norm(k, k_weight, eps), cos, sin), v, gate)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize each head of queries or keys, before rope."""
    return rms_norm(x, weight, eps)


def output_gate(o: Tensor, gate: Tensor) -> Tensor:
    """``o * sigmoid(gate)`` in the run's dtype; saves both inputs, not the sigmoid."""
    out: Tensor = _OutputGate.apply(o, gate)  # type: ignore[no-untyped-call]
    return out


class _OutputGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(o, gate)
        return torch.sigmoid(gate).mul_(o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        o, gate = ctx.saved_tensors
        open_ = torch.sigmoid(gate)
        return dy * open_, torch.ops.aten.sigmoid_backward(dy * o, open_)
