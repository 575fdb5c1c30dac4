"""Triton kernels of the router and of weighted SwiGLU: one kernel per direction.

This file decides the block sizes; results are those of `reference` and, for the router, of
`moe.router`. The router's forward also sums the probabilities of its tokens, in a fixed order.
Importing this file imports Triton.

Shapes: R rows, T tokens, E experts, k experts per token, I an expert's inner size.
"""

# Triton kernels have no types that mypy knows.
# mypy: ignore-errors

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcore.ops import GradBuffers, Routing, tl, triton

from ..launch import cdiv, launch, next_power_of_2, rows_of, supported

_TOKENS = 8  # tokens per program of the router


@triton.jit
def _route(scores, weights, chosen, partial, T, E, stride, K: tl.constexpr, BT: tl.constexpr,
           BE: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    here = (t < T)[:, None] & (e < E)[None, :]
    s = tl.load(scores + t[:, None].to(tl.int64) * stride + e[None, :], mask=here, other=0.0)
    s = tl.where((e < E)[None, :], s.to(tl.float32), float("-inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    sums = tl.sum(tl.where((t < T)[:, None], p, 0.0), 0)
    tl.store(partial + tl.program_id(0) * E + e, sums, mask=e < E)
    left = tl.where((e < E)[None, :], p, -1.0)
    j = tl.arange(0, BK)
    picked = tl.zeros((BT, BK), dtype=tl.float32)
    for number in tl.static_range(K):
        best, at = tl.max(left, 1, return_indices=True)
        tl.store(chosen + t.to(tl.int64) * K + number, at.to(tl.int64), mask=t < T)
        picked = tl.where((j == number)[None, :], best[:, None], picked)
        left = tl.where(e[None, :] == at[:, None], -1.0, left)
    picked = picked / tl.sum(picked, 1)[:, None]
    to = weights + t[:, None].to(tl.int64) * K + j[None, :]
    tl.store(to, picked.to(weights.dtype.element_ty), mask=(t < T)[:, None] & (j < K)[None, :])


@triton.jit
def _route_backward(scores, chosen, dweights, dsums, out, T, E, stride, WEIGHTS: tl.constexpr,
                    SUMS: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
                    BE: tl.constexpr):  # fmt: skip
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    here = (t < T)[:, None] & (e < E)[None, :]
    s = tl.load(scores + t[:, None].to(tl.int64) * stride + e[None, :], mask=here, other=0.0)
    s = tl.where((e < E)[None, :], s.to(tl.float32), float("-inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    dp = tl.zeros((BT, BE), dtype=tl.float32)
    if SUMS:
        dp += tl.load(dsums + e, mask=e < E, other=0.0)[None, :]
    if WEIGHTS:
        # w = p / S over the picked: dp = (dw - sum dw w) / S.
        hit = tl.zeros((BT, BE), dtype=tl.float32)
        dw = tl.zeros((BT, BE), dtype=tl.float32)
        for number in tl.static_range(K):
            at = tl.load(chosen + t.to(tl.int64) * K + number, mask=t < T, other=0)
            dweight = tl.load(dweights + t.to(tl.int64) * K + number, mask=t < T, other=0.0)
            mine = e[None, :] == at[:, None]
            hit = tl.where(mine, 1.0, hit)
            dw = tl.where(mine, dweight.to(tl.float32)[:, None], dw)
        total = tl.sum(hit * p, 1)[:, None]
        mean = tl.sum(dw * p, 1)[:, None] / total
        dp += hit * (dw - mean) / total
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    to = out + t[:, None].to(tl.int64) * E + e[None, :]
    tl.store(to, ds.to(out.dtype.element_ty), mask=here)


def router(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`moe.router`: weights, experts, summed probabilities."""
    out: tuple[Tensor, Tensor, Tensor] = _Router.apply(scores, k)
    return out


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        supported(scores)
        scores = rows_of(scores)
        tokens, experts = scores.shape
        blocks = cdiv(tokens, _TOKENS)
        weights = scores.new_empty(tokens, k)
        chosen = torch.empty(tokens, k, dtype=torch.int64, device=scores.device)
        partial = torch.empty(blocks, experts, dtype=torch.float32, device=scores.device)
        launch(
            _route, (blocks,), scores, weights, chosen, partial, tokens, experts,
            scores.stride(0), K=k, BT=_TOKENS, BE=next_power_of_2(experts),
            BK=next_power_of_2(k), num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(scores, chosen)
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        return weights, chosen, partial.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dweights: Tensor | None, _: None, dsums: Tensor | None) -> Any:
        scores, chosen = ctx.saved_tensors
        if dweights is None and dsums is None:
            return None, None
        (tokens, experts), k = scores.shape, chosen.shape[1]
        out = scores.new_empty(tokens, experts)
        launch(
            _route_backward, (cdiv(tokens, _TOKENS),), scores, chosen,
            scores if dweights is None else dweights.contiguous(),
            scores if dsums is None else dsums.contiguous(), out, tokens, experts,
            scores.stride(0), WEIGHTS=dweights is not None, SUMS=dsums is not None, K=k,
            BT=_TOKENS, BE=next_power_of_2(experts), num_warps=4,
        )  # fmt: skip
        return out, None


@triton.jit
def _up(gate, up, weight, order, out, R, N, stride_gate, stride_up,
        SHARED: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    here = (row < R)[:, None] & (i < N)[None, :]
    g = tl.load(gate + row[:, None] * stride_gate + i[None, :], mask=here, other=0.0)
    u = tl.load(up + row[:, None] * stride_up + i[None, :], mask=here, other=0.0)
    g, u = g.to(tl.float32), u.to(tl.float32)
    at = row if SHARED else tl.load(order + row, mask=row < R, other=0)
    w = tl.load(weight + at, mask=row < R, other=0.0).to(tl.float32)
    if SHARED:
        w = tl.sigmoid(w)
    y = g * tl.sigmoid(g) * u * w[:, None]
    tl.store(out + row[:, None] * N + i[None, :], y.to(out.dtype.element_ty), mask=here)


@triton.jit
def _up_backward(gate, up, weight, order, dy, dgate, dup, dweight, R, N, stride_gate, stride_up,
                 stride_dy, stride_dgate, stride_dup,
                 SHARED: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    i = tl.arange(0, BI)
    at = row if SHARED else tl.load(order + row, mask=row < R, other=0)
    w = tl.load(weight + at, mask=row < R, other=0.0).to(tl.float32)
    if SHARED:
        w = tl.sigmoid(w)
    here = (row < R)[:, None] & (i < N)[None, :]
    g = tl.load(gate + row[:, None] * stride_gate + i[None, :], mask=here, other=0.0)
    u = tl.load(up + row[:, None] * stride_up + i[None, :], mask=here, other=0.0)
    d = tl.load(dy + row[:, None] * stride_dy + i[None, :], mask=here, other=0.0)
    g, u, d = g.to(tl.float32), u.to(tl.float32), d.to(tl.float32)
    s = tl.sigmoid(g)
    dw = tl.sum(d * g * s * u, 1)
    if SHARED:
        dw = dw * w * (1.0 - w)
    tl.store(dweight + at, dw.to(dweight.dtype.element_ty), mask=row < R)
    d = d * w[:, None]
    dg = d * u * s * (1.0 + g * (1.0 - s))
    to = dgate + row[:, None] * stride_dgate + i[None, :]
    tl.store(to, dg.to(dgate.dtype.element_ty), mask=here)
    to = dup + row[:, None] * stride_dup + i[None, :]
    tl.store(to, (d * g * s).to(dup.dtype.element_ty), mask=here)


def _forward(gate: Tensor, up: Tensor, weight: Tensor, order: Tensor | None) -> Tensor:
    rows, inner = gate.shape
    out = gate.new_empty(rows, inner)
    block = min(1024, next_power_of_2(inner))
    many = 2048 // block
    launch(
        _up, (cdiv(rows, many), cdiv(inner, block)), gate, up, weight,
        weight if order is None else order, out, rows, inner, gate.stride(0), up.stride(0),
        SHARED=order is None, BR=many, BI=block, num_warps=4,
    )  # fmt: skip
    return out


def _backward(
    gate: Tensor, up: Tensor, weight: Tensor, order: Tensor | None, dy: Tensor, dgate: Tensor,
    dup: Tensor,
) -> Tensor:  # fmt: skip
    """Fill `dgate` and `dup`; return the gradient of the weight."""
    rows, inner = gate.shape
    dy = rows_of(dy)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    block = next_power_of_2(inner)
    many = max(1, 2048 // block)
    launch(
        _up_backward, (cdiv(rows, many),), gate, up, weight,
        weight if order is None else order, dy, dgate, dup, dweight, rows, inner, gate.stride(0),
        up.stride(0), dy.stride(0), dgate.stride(0), dup.stride(0), SHARED=order is None, BR=many,
        BI=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return dweight


def weighted_up(gate_up: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """`reference.weighted_up`."""
    out: Tensor = _WeightedUp.apply(gate_up, weights, routing)
    return out


class _WeightedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        supported(gate_up, weights)
        gate_up, weights = rows_of(gate_up), weights.contiguous()
        routing.save(ctx, gate_up, weights)
        gate, up = gate_up.chunk(2, -1)
        return _forward(gate, up, weights, routing.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        routing, (gate_up, weights) = Routing.saved(ctx)
        gate, up = gate_up.chunk(2, -1)
        out = gate_up.new_empty(gate_up.shape)
        dgate, dup = out.chunk(2, -1)
        return out, _backward(gate, up, weights, routing.order, dy, dgate, dup), None


def shared_up(gate: Tensor, up: Tensor, score: Tensor) -> Tensor:
    """`reference.shared_up`."""
    out: Tensor = _SharedUp.apply(gate, up, score)
    return out


class _SharedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, score: Tensor) -> Tensor:
        supported(gate, up, score)
        ctx.slices = GradBuffers(gate, up)
        gate, up, score = rows_of(gate), rows_of(up), score.contiguous()
        ctx.save_for_backward(gate, up, score)
        return _forward(gate, up, score, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, score = ctx.saved_tensors
        dgate, dup = ctx.slices.gradients(gate, None, None)
        return dgate, dup, _backward(gate, up, score, None, dy, dgate, dup)
