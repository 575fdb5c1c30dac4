"""Cross entropy over a large vocabulary, on supervised positions only and in chunks.

This file decides that full logits never exist: hidden states of supervised positions meet the head
a few rows at a time, and the gradient of the hidden states is computed in the same pass, so that
nothing is recomputed and no logits are saved. The head is frozen.

Shapes: S supervised positions, H hidden size, V vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Bytes of one chunk's logits, in the head's dtype and in float32 together.
CHUNK_BYTES = 400 * 2**20


def cross_entropy_sum(
    hidden: Tensor, head: Tensor, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """Sum of ``-log softmax(hidden head^T)[target]`` over rows, float32.

    Args:
        hidden: ``[S, H]``.
        head: ``[V, H]``, frozen.
        targets: ``[S]`` int64 in ``[0, V)``.
        chunk: rows whose logits exist at a time; by default as many as `CHUNK_BYTES` hold.
    """
    chunk = chunk or chunk_rows(head)
    loss: Tensor = _CrossEntropy.apply(hidden, head, targets, chunk)  # type: ignore[no-untyped-call]
    return loss


def chunk_rows(head: Tensor) -> int:
    """The rows whose logits `CHUNK_BYTES` hold, for a head ``[V, H]``."""
    return max(16, CHUNK_BYTES // ((4 + head.element_size()) * len(head)))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # Two buffers for all chunks: fresh ones of this size cost a page fault every 4 KiB.
        rows = min(chunk, len(hidden))
        scores = hidden.new_empty(rows, len(head))
        logs = hidden.new_empty(rows, len(head), dtype=torch.float32)
        for at in range(0, len(hidden), chunk):
            part, wanted = hidden[at : at + chunk], targets[at : at + chunk, None]
            logits, log_p = scores[: len(part)], logs[: len(part)]
            torch.mm(part, head.t(), out=logits)
            torch.log_softmax(logits, -1, torch.float32, out=log_p)
            picked = log_p.gather(1, wanted)
            total -= picked.sum()
            if grad is not None:
                # softmax - one hot, each rounded once to the head's dtype
                torch.exp(log_p, out=logits)
                # Not scatter_: on the CPU it goes over the whole chunk once more.
                each = torch.arange(len(part), device=logits.device)
                logits[each, wanted[:, 0]] = picked[:, 0].expm1().to(logits.dtype)
                torch.mm(logits, head, out=grad[at : at + chunk])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        if grad is None:
            return None, None, None, None
        # In float32: 1 / tokens rounded to bf16 would be off by as much as 0.4 %.
        return (grad.float() * scale).to(grad.dtype), None, None, None
