"""Cross entropy over a large vocabulary on a GPU: two products and one kernel per chunk.

This file decides how many rows' logits exist at a time on a GPU and how they become their own
gradient in place; it computes `loss.cross_entropy_sum` and has its signature. It needs Triton at
import; `kernels.registry` imports it if it is used.

A chunk's logits are read twice and written once. The second pass reads backwards, because what was
read last is still in the cache. The gradient is that of the mean over the rows, which a step asks
for: its bf16 values are rounded once, as in autograd, whereas those of the sum would be rounded
again by ``1 / rows``. Any other scale of backward is applied to them there.

Shapes: S supervised positions, H hidden size, V vocabulary rows, R rows of a chunk.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# Types of kernels are Triton's.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..api.records import Verdict
from .kernels.compare import compare, worst_verdict
from .kernels.language import tl, triton
from .kernels.launch import cdiv, launch
from .loss import cross_entropy_sum as reference

#: Bytes that a chunk's logits may take: 1024 rows of 248,320 in bf16. Larger chunks made the whole
#: loss at most 7 % faster on an H100, at widths from 1024 to 4096.
CHUNK_BYTES = 512 * 2**20
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


def cross_entropy_sum(
    hidden: Tensor, head: Tensor, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """Sum of ``-log softmax(hidden head^T)[target]`` over rows, float32.

    Args:
        hidden: ``[S, H]``, bfloat16 or float32.
        head: ``[V, H]`` of the same dtype, frozen.
        targets: ``[S]`` int64 in ``[0, V)``.
        chunk: rows whose logits exist at a time; by default `chunk_rows`.
    """
    if not len(hidden):
        return (hidden.float() * 0).sum()
    chunk = chunk or chunk_rows(len(head), head.element_size())
    loss: Tensor = _CrossEntropy.apply(hidden, head, targets, chunk)  # type: ignore[no-untyped-call]
    return loss


def chunk_rows(vocabulary: int, itemsize: int) -> int:
    """Rows of a chunk: whole tiles of the products, where `CHUNK_BYTES` hold one."""
    most = max(1, CHUNK_BYTES // (vocabulary * itemsize))
    return most - most % 128 if most > 128 else most


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
        grad = hidden.new_empty(hidden.shape) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        block = min(16384, 1 << (len(head) - 1).bit_length())
        scores = hidden.new_empty(min(chunk, len(hidden)), len(head))
        for at in range(0, len(hidden), chunk):
            part = hidden[at : at + chunk]
            logits = scores[: len(part)]
            torch.mm(part, head.t(), out=logits)
            launch(
                _rows, (len(part),), logits, targets[at : at + chunk], losses[at : at + chunk],
                1 / len(hidden), V=len(head), GRADIENT=grad is not None, BLOCK=block,
                num_warps=max(1, block // 512),
            )  # fmt: skip
            if grad is not None:
                torch.mm(logits, head, out=grad[at : at + chunk])
        ctx.save_for_backward(grad)
        ctx.rows = float(len(hidden))
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        out = torch.empty_like(grad)
        count = grad.numel()
        grid = (cdiv(count, 4096),)
        launch(_scaled, grid, grad, scale, ctx.rows, out, count, BLOCK=4096, num_warps=8)
        return out, None, None, None


@triton.jit
def _rows(
    LOGITS, TARGETS, LOSSES, scale, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One row: its loss, and ``scale (softmax - onehot)`` in place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * V
    target = tl.load(TARGETS + row).to(tl.int32)
    chosen = tl.load(logits + target).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    # Every lane has its own maximum and sum; finite, for inf - inf is none.
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, V, BLOCK):
        here = logits + at + columns
        x = tl.load(here, mask=at + columns < V, other=-1e30, eviction_policy="evict_last")
        z = x.to(tl.float32) * _LOG2E
        e = tl.exp2(-tl.abs(z - top))
        total = tl.where(z > top, total * e + 1, total + e)
        top = tl.maximum(top, z)
    most = tl.max(top, 0)
    log2_sum = most + tl.log2(tl.sum(total * tl.exp2(top - most), 0))
    log_p = chosen - log2_sum * _LN2
    tl.store(LOSSES + row, -log_p)
    if GRADIENT:
        # exp(z) - 1 by its series where the difference would lose digits
        series = log_p * (1 + log_p * (0.5 + log_p * (1 / 6 + log_p / 24)))
        hit = tl.where(log_p > -0.03, series, tl.exp2(log_p * _LOG2E) - 1)
        blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
        for back in range(blocks):
            where = (blocks - 1 - back) * BLOCK + columns
            here = logits + where
            x = tl.load(here, mask=where < V, other=-1e30, eviction_policy="evict_first")
            p = tl.exp2(x.to(tl.float32) * _LOG2E - log2_sum)
            p = tl.where(where == target, hit, p) * scale
            p = p.to(LOGITS.dtype.element_ty)
            tl.store(here, p, mask=where < V, eviction_policy="evict_first")


@triton.jit
def _scaled(GRAD, SCALE, rows, OUT, count, BLOCK: tl.constexpr):
    """What is left of the scale, in float32: of 1 / rows it is 1, and nothing is rounded again."""
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(SCALE).to(tl.float32) * rows
    x = tl.load(GRAD + where, mask=where < count).to(tl.float32)
    tl.store(OUT + where, (x * scale).to(OUT.dtype.element_ty), mask=where < count)


def verify(device: torch.device) -> Verdict:
    """Loss and gradient on rows of several chunks, odd sizes, and a target that is nearly sure."""
    generator = torch.Generator(device).manual_seed(0)

    def case(s: int, h: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(s, h, generator=generator, device=device).to(dtype)
        head = (torch.randn(v, h, generator=generator, device=device) * 2 / h**0.5).to(dtype)
        targets = torch.randint(v, (s,), generator=generator, device=device)
        targets[0] = (hidden[:1] @ head.t()).argmax()
        return hidden, head, targets

    # Bounds are those of bf16: products and the gradient are rounded once each.
    return worst_verdict(
        *(
            compare(
                cross_entropy_sum, reference, [*case(s, h, v, torch.bfloat16), chunk],
                output=2e-3, gradient=1e-2, gradients_of=(0,),
            )
            for s, h, v, chunk in ((130, 256, 8003, 48), (3, 64, 40000, None))
        )
    )  # fmt: skip
