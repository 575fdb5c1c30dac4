"""`Routing`: sorts the k expert choices of each token by expert, and maps results back.

This file decides that the order is stable, by (expert, token, choice), that it is saved for
backward as tensors, and that the host need not know it. The plugin picks the experts, `experts`
computes the rows.

Shapes: T tokens, k experts a token, ``R = T k`` rows, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Routing:
    """Where each of ``T k`` rows goes. Build with `Routing.of`.

    Attributes:
        order: ``[R]`` int64, the flat place (token, choice) of each sorted row.
        inverse: ``[R]`` int64, the sorted row of each flat place.
        ends: ``[E]`` int32, where each expert's rows end.
        k: experts a token.
        tiles: what a backend derives from `ends`, once for all maps that have this routing.
    """

    def __init__(
        self,
        order: Tensor,
        inverse: Tensor,
        ends: Tensor,
        k: int,
        tiles: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> None:
        self.order = order
        self.inverse = inverse
        self.ends = ends
        self.k = k
        self.tiles = tiles
        self._counts = counts

    @staticmethod
    def of(chosen: Tensor, experts: int) -> Routing:
        """From the experts of each token ``[T, k]`` int64."""
        flat = chosen.flatten()
        ordered, order = flat.sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        numbers = torch.arange(experts, device=flat.device)
        ends = torch.searchsorted(ordered, numbers, right=True, out_int32=True)
        return Routing(order, inverse, ends, chosen.shape[1])

    def save(self, ctx: Any, *tensors: Tensor | None) -> None:
        """Save `tensors` for backward together with where their rows went.

        As saved tensors, both are of the same forward, also where that is run again.
        """
        ctx.save_for_backward(self.order, self.inverse, self.ends, self.tiles, *tensors)
        ctx.k = self.k

    @staticmethod
    def saved(ctx: Any) -> tuple[Routing, list[Any]]:
        """What `save` saved."""
        order, inverse, ends, tiles, *tensors = ctx.saved_tensors
        return Routing(order, inverse, ends, ctx.k, tiles), tensors

    @property
    def tokens(self) -> Tensor:
        """``[R]`` int64: the token of each sorted row."""
        return self.order // self.k

    def sum(self, rows: Tensor) -> Tensor:
        """``[R, H] -> [T, H]``: the sum of each token's rows; no autograd."""
        flat = rows.index_select(0, self.inverse)
        return flat.view(-1, self.k, rows.shape[-1]).sum(1)

    @property
    def chosen(self) -> Tensor:
        """``[T, k]`` int64: the experts of each token, as they were given."""
        where = torch.searchsorted(self.ends, self.inverse.to(self.ends.dtype), right=True)
        return where.view(-1, self.k)

    @property
    def counts(self) -> Tensor:
        """``[E]`` int64: rows by expert."""
        if self._counts is not None:
            return self._counts
        return self.ends.long().diff(prepend=self.ends.new_zeros(1, dtype=torch.int64))

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """``E + 1`` rows between which each expert's lie; waits for the device."""
        if self.ends.is_meta:  # no numbers: as if every expert had as many
            rows, experts = len(self.order), len(self.ends)
            return tuple(rows * e // experts for e in range(experts + 1))
        return (0, *self.ends.tolist())

    @property
    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(expert, first row, end) of every expert that has rows."""
        return ((e, a, b) for e, (a, b) in enumerate(pairwise(self.bounds)) if b > a)

    def gather(self, x: Tensor) -> Tensor:
        """``[T, H] -> [R, H]``: each token k times, sorted by expert."""
        rows: Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return rows

    def combine(self, rows: Tensor, weights: Tensor) -> Tensor:
        """``[R, H], [T, k] -> [T, H]``: the weighted sum of each token's rows, rounded once."""
        out: Tensor = _Combine.apply(rows, weights, self)  # type: ignore[no-untyped-call]
        return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing) -> Tensor:
        routing.save(ctx)
        return x.index_select(0, routing.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        routing, _ = Routing.saved(ctx)
        return routing.sum(dy), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        routing.save(ctx, rows, weights)
        flat = rows.index_select(0, routing.inverse).view(-1, routing.k, rows.shape[-1])
        return torch.bmm(weights.unsqueeze(1), flat).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        routing, (rows, weights) = Routing.saved(ctx)
        drows = dy.index_select(0, routing.tokens)
        products = torch.bmm(rows.unsqueeze(1), drows.unsqueeze(2)).flatten()
        dweights = products.index_select(0, routing.inverse).view_as(weights)
        drows.mul_(weights.flatten().index_select(0, routing.order).unsqueeze(1))
        return drows, dweights, None
