"""Attention on the meta device: what torch's fused kernels allocate and save, without computing.

This file decides what replaces them for the planner; on meta torch would take its unfused form,
whose memory is quadratic. In backward FlashAttention and cuDNN sum the gradient of q in float32,
and those of grouped keys for each query head.

Shapes: T tokens, Hq query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.launch import record_work

#: Of the rate of a layer's products: cuDNN on an H100, 2 x 4096 tokens, heads of 256.
FORWARD, BACKWARD = 0.88, 0.5


def planned_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int], scale: float
) -> Tensor:
    """`attention.varlen_attention` of meta tensors."""
    out: Tensor = _Planned.apply(q, k, v, tuple(cu_seqlens))  # type: ignore[no-untyped-call]
    return out


class _Planned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
        o = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[1], len(q), dtype=torch.float32)
        # Two products over the lower half of the scores.
        pairs = sum((end - start) ** 2 for start, end in pairwise(cu_seqlens)) / 2
        ctx.flops = 4 * pairs * q.shape[1] * q.shape[2]
        record_work("attention", q, k, v, o, lse, flops=ctx.flops / FORWARD)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        sums = q.new_empty(q.shape, dtype=torch.float32)
        rows = torch.empty_like(lse)
        expanded = [q.new_empty(q.shape) for _ in range(2)] if q.shape[1] != k.shape[1] else []
        record_work(
            "attention_backward",
            q,
            k,
            v,
            o,
            do,
            dq,
            sums,
            *expanded,
            flops=2.5 * ctx.flops / BACKWARD,
        )
        del sums, rows, expanded
        return dq, dk, dv, None
