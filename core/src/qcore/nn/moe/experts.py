"""`Experts`: one frozen linear layer with LoRA per MoE expert, and its reference in torch.

This file decides that the cost is linear in the rows, how ``y_i = x_i W_e^T + s x_i A_e^T B_e^T``
is computed with torch alone, and what is saved for its backward: the input as the caller passed it,
never the dequantized weights, nor rows that can be gathered from tokens. `routing` sorts the rows,
`moe.triton` has the same map for a GPU. The router, what lies between two maps, and shared experts
belong to the plugin.

LoRA's matrices have PEFT's layout for stacked parameters: row ``e r + k`` of A belongs to expert e
(expert-major), column ``k E + e`` of B does (rank-major).

Shapes: T tokens, k experts a token, ``R = T k`` rows, E experts, ``W [E, out, in]``,
``A [E r, in]``, ``B [out, r E]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.launch import on_gpu
from ..qlora.lora_layer import Lora, LoraLayer
from ..qlora.nf4 import Dequantize, NF4Stack, dequantize
from .routing import Routing

__all__ = ["Experts", "Routing", "Tokens", "grouped"]

TOGETHER = 2**31  #: bytes of weights that are dequantized for one launch

#: What a map reads or gives in place of sorted rows: tokens, each of which goes to its k
#: experts (``in``), or gets the sum of its k rows (``out``).
Tokens = Literal["in", "out"] | None
Compute = Callable[[Tensor, "Experts", Routing, Tokens], Tensor]


class Experts(LoraLayer):
    """One linear map per expert: ``module(rows [R, in], routing) -> [R, out]``.

    Args (beside those of `LoraLayer`):
        compute: the op ``experts``; by default its reference, `grouped`.

    Attributes:
        compute: as given.
        resident: keep the dequantized stack too, where ``2 E out in`` bytes are free: the same
            bits, read once and not in each pass.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        lora: Lora | None,
        *,
        dequantize: Dequantize = dequantize,
        compute: Compute | None = None,
    ) -> None:
        super().__init__(shape, dtype, lora, dequantize=dequantize)
        self.nf4: NF4Stack | None = None
        self._taken = 0
        self.reader: Callable[[int], Tensor] | None = None
        self.compute: Compute = compute or grouped
        self.resident = False
        self._dense: Tensor | None = None

    def lora_shapes(self, r: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """``A [E r, in]``, ``B [out, r E]``."""
        experts, out, into = self.shape
        return (experts * r, into), (out, r * experts)

    def hold(self, rows: slice, value: Tensor, *, quantize: bool, dtype: torch.dtype) -> None:
        """Take some experts' weights ``[n, out, in]``."""
        if rows.start not in (0, self._taken):
            raise ValueError(f"experts {rows} are given after {self._taken} of {self.shape[0]}")
        self._taken = rows.stop
        if quantize:
            if self.nf4 is None:
                shape = cast(tuple[int, int, int], self.shape)
                self.nf4 = NF4Stack(shape, dtype, value.device, self.dequantize)
                self.weight = None
            self.nf4.put(rows, value)
            return
        if self.weight is None or self.weight.is_meta:
            whole = torch.empty(self.shape, dtype=dtype, device=value.device)
            self.weight = nn.Parameter(whole, requires_grad=False)
        self.weight.data[rows] = value.to(dtype)

    def read_from(self, reader: Callable[[int], Tensor] | None) -> None:
        """Hold nothing: ask `reader` for the weight ``[out, in]`` of an expert when it has rows."""
        self.reader = reader

    @property
    def four_bit(self) -> bool:
        """Whether the experts are NF4, all of them."""
        return self.nf4 is not None and self._taken == self.shape[0]

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales, or of the weight."""
        if self.nf4 is not None:
            return self.nf4.nbytes
        assert self.weight is not None
        return self.weight.nbytes

    @property
    def moved(self) -> tuple[int, int]:
        """How many experts' B left zero: those that rows were routed to."""
        if self.lora_B is None:
            return 0, self.shape[0]
        return int(self.touched(self.lora_B.detach()).sum()), self.shape[0]

    def touched(self, values: Tensor) -> Tensor:
        """Experts for which a value ``[out, r E]`` is not zero."""
        experts, out, _ = self.shape
        return values.view(out, -1, experts).any(0).any(0)

    def dense_slice(self, expert: int) -> Tensor:
        """The weight ``[out, in]`` of one expert in the run's dtype."""
        if self.reader is not None:
            return self.reader(expert)
        if self.nf4 is not None:
            return self.nf4.dense_slice(expert)
        assert self.weight is not None
        return self.weight[expert]

    def dense_slices(self, experts: slice) -> Tensor:
        """The weights of neighbours ``[n, out, in]`` in the run's dtype."""
        if self.nf4 is not None:
            if not self.resident:
                self._dense = None
                return self.nf4.dense_slices(experts)
            if self._dense is None:
                self._dense = self.nf4.dense()
            return self._dense[experts]
        assert self.weight is not None
        return self.weight[experts]

    @property
    def matrices(self) -> tuple[Tensor | None, Tensor | None]:
        """A and B where they count."""
        return (self.lora_A, self.lora_B) if self.lora is not None else (None, None)

    def forward(self, x: Tensor, routing: Routing, tokens: Tokens = None) -> Tensor:
        """``[R, in] -> [R, out]``, rows sorted by expert.

        Args:
            x: rows; or, with `tokens` "in", tokens ``[T, in]``.
            routing: where they go.
            tokens: "out": give ``[T, out]``, the sum of each token's rows.
        """
        compute = self.compute if self.reader is None else grouped
        return compute(x, self, routing, tokens)


def grouped(x: Tensor, module: Experts, routing: Routing, tokens: Tokens = None) -> Tensor:
    """What `Experts` computes, with torch alone: its arguments are those of ``forward``."""
    a, b = module.matrices
    out: Tensor = _Grouped.apply(x, a, b, module, routing, tokens)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    """``x W_e^T + s (x A_e^T) B_e^T`` by expert; saves x and ``x A_e^T``."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        module: Experts,
        routing: Routing,
        tokens: Tokens,
    ) -> Tensor:
        ctx.module, ctx.tokens = module, tokens
        x = source.index_select(0, routing.tokens) if tokens == "in" else source
        product: _Products = _Fused(routing) if _is_fused(x, module) else _Loop(routing)
        y = product.forward(x, module)
        xa = None
        if a is not None and b is not None:
            assert module.lora is not None
            # Scaled before it is rounded to the run's dtype, not after.
            by_a, by_b = _by_expert(a, b * module.lora.scaling, module, x.dtype, product.multiple)
            xa = product.forward(x, by_a)
            product.forward(xa, by_b, add_to=y)
        routing.save(ctx, source, xa, a, b)
        ctx.product = type(product)
        return routing.sum(y) if tokens == "out" else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        routing, (x, xa, a, b) = Routing.saved(ctx)
        module, product = ctx.module, ctx.product(routing)
        if ctx.tokens == "out":
            dy = dy.index_select(0, routing.tokens)
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = product.backward(dy, module)
        if xa is not None:
            if ctx.tokens == "in":
                x = x.index_select(0, routing.tokens)
            r, scaling = module.lora.r, module.lora.scaling
            by_a, by_b = _by_expert(a, b, module, x.dtype, product.multiple)
            dxa = product.backward(dy, by_b).mul_(scaling)
            da = product.outer(dxa, x)[:, :r].reshape(a.shape).to(a.dtype)
            db = product.outer(dy, xa)[:, :, :r].mul(scaling)
            db = db.permute(1, 2, 0).reshape(b.shape).to(b.dtype)
            if dx is not None:
                product.backward(dxa, by_a, add_to=dx)
        if dx is not None and ctx.tokens == "in":
            dx = routing.sum(dx)
        return dx, da, db, None, None, None


def _is_fused(x: Tensor, module: Experts) -> bool:
    """Whether torch's grouped product takes these shapes: 16-bit on CUDA, rows aligned."""
    _, out, into = module.shape
    aligned = not (out % _Fused.multiple or into % _Fused.multiple)
    return on_gpu(x) and x.dtype == torch.bfloat16 and aligned and module.reader is None


def _by_expert(
    a: Tensor, b: Tensor, module: Experts, dtype: torch.dtype, multiple: int
) -> tuple[Tensor, Tensor]:
    """``A [E, r, in]``, ``B [E, out, r]``, r filled up with zeros to a multiple."""
    experts, out, into = module.shape
    by_a = a.to(dtype).view(experts, -1, into)
    by_b = b.to(dtype).view(out, -1, experts).permute(2, 0, 1).contiguous()
    more = -by_a.shape[1] % multiple
    return (F.pad(by_a, (0, 0, 0, more)), F.pad(by_b, (0, more))) if more else (by_a, by_b)


Weights = Tensor | Experts  #: by expert: LoRA's, which are there, or the base's, which are read


@dataclass(frozen=True, slots=True)
class _Loop:
    """The products expert by expert: each weight is read when its turn comes."""

    routing: Routing
    multiple: ClassVar[int] = 1

    def forward(self, x: Tensor, weights: Weights, add_to: Tensor | None = None) -> Tensor:
        """``x_i W_e^T``: ``[R, in] -> [R, out]``."""
        y = _zeros(x, weights, 1) if add_to is None else add_to
        for e, start, end in self.routing.spans:
            y[start:end].addmm_(x[start:end], _one(weights, e).t())
        return y

    def backward(self, dy: Tensor, weights: Weights, add_to: Tensor | None = None) -> Tensor:
        """``dy_i W_e``: ``[R, out] -> [R, in]``."""
        dx = _zeros(dy, weights, 2) if add_to is None else add_to
        for e, start, end in self.routing.spans:
            dx[start:end].addmm_(dy[start:end], _one(weights, e))
        return dx

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """``sum_i left_i right_i^T`` over each expert's rows: ``[E, n, m]``."""
        out = left.new_zeros(len(self.routing.ends), left.shape[1], right.shape[1])
        for e, start, end in self.routing.spans:
            torch.mm(left[start:end].t(), right[start:end], out=out[e])
        return out


@dataclass(frozen=True, slots=True)
class _Fused:
    """The products a few launches at a time: neighbours' weights are dequantized together."""

    routing: Routing
    multiple: ClassVar[int] = 8  # 16 bytes

    def forward(self, x: Tensor, weights: Weights, add_to: Tensor | None = None) -> Tensor:
        return self._product(x, weights, add_to, turned=True)

    def backward(self, dy: Tensor, weights: Weights, add_to: Tensor | None = None) -> Tensor:
        return self._product(dy, weights, add_to, turned=False)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        return F.grouped_mm(left.t(), right, offs=self.routing.ends)

    def _product(
        self, x: Tensor, weights: Weights, add_to: Tensor | None, *, turned: bool
    ) -> Tensor:
        count, out, into = weights.shape
        step = max(1, TOGETHER // (2 * out * into))
        if step >= count:
            # All at once: where experts' rows lie need not be known here.
            every = _some(weights, slice(0, count))
            y = F.grouped_mm(x, _turn(every, turned), offs=self.routing.ends)
            return y if add_to is None else add_to.add_(y)
        y = _zeros(x, weights, 1 if turned else 2) if add_to is None else add_to
        bounds = self.routing.bounds
        for first in range(0, count, step):
            last = min(first + step, count)
            rows = slice(bounds[first], bounds[last])
            if rows.stop > rows.start:
                ends = self.routing.ends[first:last] - rows.start
                part = _turn(_some(weights, slice(first, last)), turned)
                y[rows] += F.grouped_mm(x[rows], part, offs=ends)
        return y


def _turn(weights: Tensor, turned: bool) -> Tensor:
    return weights.transpose(1, 2) if turned else weights


_Products = _Loop | _Fused


def _zeros(x: Tensor, weights: Weights, dim: int) -> Tensor:
    return x.new_zeros(len(x), weights.shape[dim])


def _one(weights: Weights, expert: int) -> Tensor:
    return weights[expert] if isinstance(weights, Tensor) else weights.dense_slice(expert)


def _some(weights: Weights, experts: slice) -> Tensor:
    return weights[experts] if isinstance(weights, Tensor) else weights.dense_slices(experts)
