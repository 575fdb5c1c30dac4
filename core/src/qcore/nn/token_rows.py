"""Rows of the embedding that are trained, and their gradient from embeddings and a tied head.

This file decides that the trained rows are float32 masters that are written into the frozen
embedding before each forward, so that every reader of the embedding sees them, and that their
gradients are products with a one-hot matrix: in a fixed order, summed in float32. It is PEFT's
``trainable_token_indices``. `model` decides when it runs; `loss` computes the loss.

Shapes: n trained rows, H hidden size, T tokens of a pack, V vocabulary rows, S supervised
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .loss import chunk_rows
from .qlora.fused_grads import add_product


class TokenRows(nn.Module):
    """The trained rows.

    Args:
        ids: rows of the embedding.
        width: H.

    Attributes:
        ids: as given.
        trainable_tokens_delta: the rows ``[n, H]``, float32; PEFT's name, although they are values.
    """

    trainable_tokens_delta: nn.Parameter

    def __init__(self, ids: Sequence[int], width: int) -> None:
        super().__init__()
        self.ids = tuple(ids)
        empty = torch.empty(len(self.ids), width, device="meta")
        self.trainable_tokens_delta = nn.Parameter(empty)
        self._index: Tensor | None = None

    def reset(self, rows: Tensor) -> None:
        """Start from values ``[n, H]``, trainable."""
        self.trainable_tokens_delta = nn.Parameter(rows.float(), requires_grad=True)

    def index(self, like: Tensor) -> Tensor:
        """The ids ``[n]`` on the device of `like`."""
        if self._index is None or self._index.device != like.device:
            self._index = torch.tensor(self.ids, device=like.device)
        return self._index

    @torch.no_grad()
    def write(self, embedding: Tensor) -> None:
        """Put the rows into the embedding ``[V, H]``, in its dtype."""
        rows = self.trainable_tokens_delta.to(embedding.dtype)
        embedding.index_copy_(0, self.index(embedding), rows)

    def attach(self, x: Tensor, ids: Tensor) -> Tensor:
        """Embeddings ``[T, H]`` of tokens ``[T]``, whose gradient reaches the rows."""
        if not torch.is_grad_enabled():
            return x
        attached: Tensor = _Attached.apply(  # type: ignore[no-untyped-call]
            x, self.trainable_tokens_delta, ids, self.index(ids)
        )
        return attached


class _Attached(torch.autograd.Function):
    """x; its gradient goes to the rows of the tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, ids: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(ids, index)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        ids, index = ctx.saved_tensors
        one_hot = (index[:, None] == ids[None, :]).to(dx.dtype)
        gradient = dx.new_empty(len(index), dx.shape[1], dtype=torch.float32)
        add_product(gradient, one_hot, dx, 1.0, fresh=True)
        return dx if ctx.needs_input_grad[0] else None, gradient, None, None


def tied_cross_entropy_sum(
    hidden: Tensor, head: Tensor, targets: Tensor, rows: TokenRows, chunk: int | None = None
) -> Tensor:
    """`loss.cross_entropy_sum` where the head is the embedding that has the trained rows.

    Args:
        hidden: ``[S, H]``.
        head: ``[V, H]``, with the rows written into it.
        targets: ``[S]`` int64 in ``[0, V)``.
        rows: the trained rows.
        chunk: positions whose logits exist at a time.
    """
    loss: Tensor = _TiedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, rows.trainable_tokens_delta, head, targets, rows.index(targets),
        chunk or chunk_rows(head), torch.is_grad_enabled(),
    )  # fmt: skip
    return loss


class _TiedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, rows: Tensor, head: Tensor, targets: Tensor, index: Tensor,
        chunk: int, wants: bool,
    ) -> Tensor:  # fmt: skip
        grad = torch.empty_like(hidden) if wants else None
        of_rows = torch.zeros_like(rows) if wants else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for at in range(0, len(hidden), chunk):
            part, wanted = hidden[at : at + chunk], targets[at : at + chunk, None]
            logits = part @ head.t()
            log_p = torch.log_softmax(logits, -1, torch.float32)
            picked = log_p.gather(1, wanted)
            total -= picked.sum()
            if grad is not None and of_rows is not None:
                torch.exp(log_p, out=logits)
                each = torch.arange(len(part), device=logits.device)
                logits[each, wanted[:, 0]] = picked[:, 0].expm1().to(logits.dtype)
                torch.mm(logits, head, out=grad[at : at + chunk])
                add_product(of_rows, logits.index_select(1, index).t(), part, 1.0, fresh=False)
        ctx.save_for_backward(grad, of_rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        grad, of_rows = ctx.saved_tensors
        if grad is None:
            return None, None, None, None, None, None, None
        # In float32, as in `loss`.
        back = (grad.float() * scale).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return back, of_rows * scale, None, None, None, None, None
