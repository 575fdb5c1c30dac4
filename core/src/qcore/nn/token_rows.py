"""Rows of the embedding and of the head that are trained, and their gradients.

This file decides that the trained rows are float32 masters that are written into the frozen weight
before each forward, so that every reader of the weight sees them, and that their gradients are
products with a one-hot matrix or with those of some logits: in a fixed order, summed in float32. A
head that is tied to the embedding has its rows. It is PEFT's ``trainable_token_indices``. `model`
decides when it runs; `loss` computes the loss where no row of the head is trained.

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
    """The trained rows of one weight.

    Args:
        ids: rows of the weight.
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
    def write(self, weight: Tensor) -> None:
        """Put the rows into the weight ``[V, H]``, in its dtype."""
        rows = self.trainable_tokens_delta.to(weight.dtype)
        weight.index_copy_(0, self.index(weight), rows)

    def attach(self, x: Tensor, ids: Tensor) -> Tensor:
        """Embeddings ``[T, H]`` of tokens ``[T]``, whose gradient reaches the rows."""
        if not torch.is_grad_enabled():
            return x
        attached: Tensor = _Attached.apply(  # type: ignore[no-untyped-call]
            x, self.trainable_tokens_delta, ids, self.index(ids)
        )
        return attached


class TrainedRows(nn.Module):
    """The trained rows of a model.

    Args:
        embed: ids of trained rows of the embedding.
        head: ids of trained rows of the head; none if it is tied to the embedding.
        width: H.
        tied: whether the head is the embedding.

    Attributes:
        embed: those of the embedding, ``None`` if there are none.
        head: those of the head, likewise.
    """

    embed: TokenRows | None
    head: TokenRows | None

    def __init__(
        self, embed: Sequence[int], head: Sequence[int], width: int, *, tied: bool
    ) -> None:
        super().__init__()
        self.embed = TokenRows(embed, width) if embed else None
        self.head = TokenRows(head, width) if head else None
        self._tied = tied

    def write(self, embedding: Tensor, head: Tensor) -> None:
        """Put all rows into their weights."""
        for rows, weight in ((self.embed, embedding), (self.head, head)):
            if rows is not None:
                rows.write(weight)

    def attach(self, x: Tensor, ids: Tensor) -> Tensor:
        """Embeddings ``[T, H]`` of tokens ``[T]``, whose gradient reaches the rows."""
        return x if self.embed is None else self.embed.attach(x, ids)

    @property
    def of_logits(self) -> TokenRows | None:
        """The rows that logits depend on, ``None`` if there are none."""
        return self.embed if self._tied else self.head


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


def cross_entropy_sum_of_rows(
    hidden: Tensor, head: Tensor, targets: Tensor, rows: TokenRows, chunk: int | None = None
) -> Tensor:
    """`loss.cross_entropy_sum` with a gradient of some rows of the head.

    Args:
        hidden: ``[S, H]``.
        head: ``[V, H]``, with the rows written into it.
        targets: ``[S]`` int64 in ``[0, V)``.
        rows: the trained rows.
        chunk: positions whose logits exist at a time.
    """
    loss: Tensor = _CrossEntropyOfRows.apply(  # type: ignore[no-untyped-call]
        hidden, rows.trainable_tokens_delta, head, targets, rows.index(targets),
        chunk or chunk_rows(head), torch.is_grad_enabled(),
    )  # fmt: skip
    return loss


class _CrossEntropyOfRows(torch.autograd.Function):
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
