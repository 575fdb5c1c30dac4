"""Gradients of LoRA's A and B in a fused product, by torch ops: the default without Triton.

This file decides that each is summed in float32 and not rounded before it is added, and that all
of A are one product if their gradients lie end to end. `fused_triton` computes the same in one
launch; `Member.accumulates` decides whether they are returned to autograd.

Shapes: T rows, K in, N out of all members, r_i ranks of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.launch import on_gpu, record_work
from ..storage import storage_id
from .members import LoraFactors

Sinks = Sequence[tuple[Tensor | None, Tensor | None]]


def sinks_of(adapters: Sequence[LoraFactors]) -> Sinks:
    """The gradients of A and B that each adapter adds to; ``None`` where autograd does."""
    return [
        (factors.a.grad, factors.b.grad) if factors.member.accumulates else (None, None)
        for factors in adapters
    ]


def adapter_gradients(
    adapters: Sequence[LoraFactors], x: Tensor, xa: Tensor, dy: Tensor, dyb: Tensor
) -> list[Tensor | None]:
    """Gradients of A and B of each member; ``None`` where they were added in place."""
    sinks = sinks_of(adapters)
    together = neighbours([a for a, _ in sinks])
    if together is not None:
        add_product(together, dyb[:, : len(together)].t(), x, 1.0, fresh=False)
        da = None
    else:
        da = dy.new_empty(adapters[-1].ranks.stop, x.shape[1], dtype=torch.float32)
        add_product(da, dyb[:, : len(da)].t(), x, 1.0, fresh=True)
    out: list[Tensor | None] = []
    for factors, (a, b) in zip(adapters, sinks, strict=True):
        if da is None:
            out.append(None)
        elif a is not None:
            a.add_(da[factors.ranks])
            out.append(None)
        else:
            out.append(da[factors.ranks].to(factors.a.dtype))
        left, right = dy[:, factors.rows].t(), xa[:, factors.ranks]
        if b is not None:
            add_product(b, left, right, factors.scaling, fresh=False)
            out.append(None)
        else:
            db = torch.empty_like(factors.b, dtype=torch.float32)
            add_product(db, left, right, factors.scaling, fresh=True)
            out.append(db.to(factors.b.dtype))
    return out


def neighbours(grads: Sequence[Tensor | None]) -> Tensor | None:
    """Gradients ``[r_i, K]`` as one ``[sum r, K]``, where all are there and lie end to end."""
    there = [grad for grad in grads if grad is not None]
    if len(there) != len(grads):
        return None
    first, end = there[0], there[0].storage_offset()
    for grad in there:
        if storage_id(grad) != storage_id(first) or grad.storage_offset() != end:
            return None
        if not grad.is_contiguous():
            return None
        end += grad.numel()
    return first.as_strided((sum(map(len, there)), first.shape[1]), first.stride())


def add_product(to: Tensor, left: Tensor, right: Tensor, by: float, *, fresh: bool) -> None:
    """``to = by left @ right``, or ``to +=``; `to` is float32, sums are not rounded before it."""
    beta = 0.0 if fresh else 1.0
    if left.is_meta and on_gpu(left):
        # Torch 2.11 has no addmm into another dtype there.
        work = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
        record_work("addmm", left, right, to, flops=work)
    elif on_gpu(left) and left.dtype != to.dtype:
        torch.addmm(to, left, right, out_dtype=to.dtype, beta=beta, alpha=by, out=to)
    else:
        torch.addmm(to, left.to(to.dtype), right.to(to.dtype), beta=beta, alpha=by, out=to)
