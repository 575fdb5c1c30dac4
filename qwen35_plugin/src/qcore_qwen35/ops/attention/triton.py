"""Triton kernels of the ops around attention: norm and rope of q and k, output gate.

This file decides that one program handles all heads of a token, reads queries from q_proj's
interleaved output in place, and in backward writes their gradient between those of the gates
(`qcore.ops.GradBuffers`). The forward rounds exactly as `reference`; the backward is float32
throughout. The gradient of a trained norm weight is computed by the reference.

Shapes: T tokens, Hq query heads, Hkv key heads, D head size, n rotating dimensions.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# Types of kernels are Triton's.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcore.ops import GradBuffers, tl, triton

from ..launch import cdiv, launch, next_power_of_2, supported
from . import reference
from .reference import AttentionInputs

GATE_BLOCK = 1024


@triton.jit
def _angles(cos_ptr, sin_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Columns, the rotation partner of each, and cosines (1 for columns that do not rotate)."""
    c = tl.arange(0, BLOCK)[None, :]
    turns = c < N
    partner = tl.where(c < N // 2, c + N // 2, c - N // 2)
    cos = tl.load(cos_ptr + c, mask=turns, other=1.0).to(tl.float32)
    return c, partner, turns, cos


@triton.jit
def _turn_forward(
    x_ptr, x_head, w_ptr, cos_ptr, sin_ptr, y_ptr, heads, eps,
    D: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    half = y_ptr.dtype.element_ty
    c, partner, turns, cos = _angles(cos_ptr, sin_ptr, N, BLOCK)
    sin = tl.load(sin_ptr + c, mask=turns, other=0.0).to(tl.float32)
    sin = tl.where(c < N // 2, -sin, sin)
    h = tl.arange(0, HEADS)[:, None]
    inside = (h < heads) & (c < D)
    x = tl.load(x_ptr + h * x_head + c, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + h * x_head + partner, mask=inside & turns, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + c, mask=c < D, other=0.0).to(tl.float32)
    w_other = tl.load(w_ptr + partner, mask=turns, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    y = ((x * inverse) * (1 + w)).to(half).to(tl.float32)
    other = ((other * inverse) * (1 + w_other)).to(half).to(tl.float32)
    y = (y * cos).to(half).to(tl.float32) + (other * sin).to(half).to(tl.float32)
    tl.store(y_ptr + h * D + c, y.to(half), mask=inside)


@triton.jit
def _forward(
    qg_ptr, k_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, q_out, k_out, qg_row, k_row, q_heads, k_heads,
    eps, D: tl.constexpr, N: tl.constexpr, QH: tl.constexpr, KH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    cos_ptr += t * N
    sin_ptr += t * N
    _turn_forward(
        qg_ptr + t * qg_row, 2 * D, qw_ptr, cos_ptr, sin_ptr, q_out + t * q_heads * D, q_heads,
        eps, D, N, QH, BLOCK,
    )  # fmt: skip
    _turn_forward(
        k_ptr + t * k_row, D, kw_ptr, cos_ptr, sin_ptr, k_out + t * k_heads * D, k_heads,
        eps, D, N, KH, BLOCK,
    )  # fmt: skip


@triton.jit
def _turn_backward(
    dy_ptr, dy_head, x_ptr, x_head, w_ptr, cos_ptr, sin_ptr, dx_ptr, heads, eps,
    D: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c, partner, turns, cos = _angles(cos_ptr, sin_ptr, N, BLOCK)
    sin = tl.load(sin_ptr + partner, mask=turns, other=0.0).to(tl.float32)
    sin = tl.where(c < N // 2, sin, -sin)
    h = tl.arange(0, HEADS)[:, None]
    inside = (h < heads) & (c < D)
    dy = tl.load(dy_ptr + h * dy_head + c, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(dy_ptr + h * dy_head + partner, mask=inside & turns, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + h * x_head + c, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + c, mask=c < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    unit = x * inverse
    dunit = (dy * cos + other * sin) * (1 + w)
    along = (tl.sum(dunit * unit, 1) / D)[:, None]
    dx = (dunit - unit * along) * inverse
    tl.store(dx_ptr + h * x_head + c, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dq_ptr, dk_ptr, qg_ptr, k_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, dqg_ptr, dkx_ptr,
    dq_row, dq_head, dk_row, dk_head, qg_row, k_row, dqg_row, dkx_row, q_heads, k_heads,
    eps, D: tl.constexpr, N: tl.constexpr, QH: tl.constexpr, KH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    cos_ptr += t * N
    sin_ptr += t * N
    _turn_backward(
        dq_ptr + t * dq_row, dq_head, qg_ptr + t * qg_row, 2 * D, qw_ptr, cos_ptr, sin_ptr,
        dqg_ptr + t * dqg_row, q_heads, eps, D, N, QH, BLOCK,
    )  # fmt: skip
    _turn_backward(
        dk_ptr + t * dk_row, dk_head, k_ptr + t * k_row, D, kw_ptr, cos_ptr, sin_ptr,
        dkx_ptr + t * dkx_row, k_heads, eps, D, N, KH, BLOCK,
    )  # fmt: skip


@triton.jit
def _gate_forward(
    o_ptr, gate_ptr, y_ptr, o_row, o_head, gate_row, gate_head, width,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    h, c = at // D, at % D
    half = y_ptr.dtype.element_ty
    o = tl.load(o_ptr + t * o_row + h * o_head + c, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + t * gate_row + h * gate_head + c, mask=inside, other=0.0)
    open_ = tl.sigmoid(gate.to(tl.float32)).to(half).to(tl.float32)
    tl.store(y_ptr + t * width + at, (open_ * o).to(half), mask=inside)


@triton.jit
def _gate_backward(
    dy_ptr, o_ptr, gate_ptr, do_ptr, dgate_ptr, dy_row, dy_head, o_row, o_head,
    gate_row, gate_head, dgate_row, dgate_head, width, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    h, c = at // D, at % D
    dy = tl.load(dy_ptr + t * dy_row + h * dy_head + c, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(o_ptr + t * o_row + h * o_head + c, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + t * gate_row + h * gate_head + c, mask=inside, other=0.0)
    open_ = tl.sigmoid(gate.to(tl.float32))
    dgate = dy * o * open_ * (1 - open_)
    tl.store(do_ptr + t * width + at, (dy * open_).to(do_ptr.dtype.element_ty), mask=inside)
    dgate_ptr += t * dgate_row + h * dgate_head + c
    tl.store(dgate_ptr, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)


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
    """`reference.attention_inputs`."""
    supported(qg)
    return AttentionInputs(*_Inputs.apply(qg, k, v, q_weight, k_weight, eps, cos, sin))  # type: ignore[no-untyped-call]


def output_gate(o: Tensor, gate: Tensor) -> Tensor:
    """`reference.output_gate`, both ``[T, heads, D]``."""
    supported(o)
    out: Tensor = _OutputGate.apply(o, gate)  # type: ignore[no-untyped-call]
    return out


def _columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shape(qg: Tensor, k: Tensor, d: int, n: int) -> dict[str, Any]:
    heads = (qg.shape[1] // (2 * d), k.shape[1] // d)
    return {
        "D": d,
        "N": n,
        "QH": next_power_of_2(heads[0]),
        "KH": next_power_of_2(heads[1]),
        "BLOCK": next_power_of_2(d),
        "num_warps": next_power_of_2(max(1, min(8, heads[0] * d // 512))),
    }


class _Inputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qg: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, ...]:
        d, n, tokens = q_weight.shape[0], cos.shape[-1], len(qg)
        qg, k, cos, sin = _columns(qg), _columns(k), cos.contiguous(), sin.contiguous()
        gate = qg.unflatten(-1, (-1, 2 * d))[..., d:]
        ctx.save_for_backward(qg, k, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.slices = eps, GradBuffers(qg, k, v, gate)
        q_heads, k_heads = qg.shape[1] // (2 * d), k.shape[1] // d
        q_out, k_out = qg.new_empty(tokens, q_heads, d), k.new_empty(tokens, k_heads, d)
        launch(
            _forward, (tokens,), qg, k, q_weight, k_weight, cos, sin, q_out, k_out,
            qg.stride(0), k.stride(0), q_heads, k_heads, eps, **_shape(qg, k, d, n),
            enable_fp_fusion=False,  # a fused multiply-add would round once instead of twice
        )  # fmt: skip
        return q_out, k_out, v.unflatten(-1, (-1, d)), gate

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dgate: Tensor) -> tuple[Any, ...]:
        qg, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        d, n = q_weight.shape[0], cos.shape[-1]
        dq, dk = _columns(dq), _columns(dk)
        dqg, dkx, dvx, _ = ctx.slices.gradients(qg, None, None, dv.flatten(1), dgate)
        launch(
            _backward, (len(qg),), dq, dk, qg, k, q_weight, k_weight, cos, sin, dqg, dkx,
            dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), qg.stride(0), k.stride(0),
            dqg.stride(0), dkx.stride(0), dq.shape[1], dk.shape[1], ctx.eps, **_shape(qg, k, d, n),
        )  # fmt: skip
        weights: list[Tensor | None] = [None, None]
        if any(ctx.needs_input_grad[3:5]):
            weights = _weight_gradients(ctx, dq, dk)
        return dqg, dkx, dvx, *weights, None, None, None


def _weight_gradients(ctx: Any, dq: Tensor, dk: Tensor) -> list[Tensor | None]:
    qg, k, *weights, cos, sin = ctx.saved_tensors
    with torch.enable_grad():
        q_weight, k_weight = (w.detach().requires_grad_() for w in weights)
        made = reference.attention_inputs(
            qg.detach(), k.detach(), k.detach(), q_weight, k_weight, ctx.eps, cos, sin
        )
    grads = torch.autograd.grad(made[:2], (q_weight, k_weight), (dq, dk))
    return [d if n else None for d, n in zip(grads, ctx.needs_input_grad[3:5], strict=True)]


class _OutputGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, gate: Tensor) -> Tensor:
        o, gate = _columns(o), _columns(gate)
        ctx.save_for_backward(o, gate)
        ctx.slices = GradBuffers(gate)
        tokens, heads, d = o.shape
        y = o.new_empty(tokens, heads, d)
        block = min(GATE_BLOCK, next_power_of_2(heads * d))
        launch(
            _gate_forward, (tokens, cdiv(heads * d, block)), o, gate, y,
            o.stride(0), o.stride(1), gate.stride(0), gate.stride(1), heads * d,
            D=d, BLOCK=block, num_warps=4,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        o, gate = ctx.saved_tensors
        dy = _columns(dy)
        tokens, heads, d = o.shape
        do = o.new_empty(tokens, heads, d)
        (dgate,) = ctx.slices.gradients(gate, None)
        block = min(GATE_BLOCK, next_power_of_2(heads * d))
        launch(
            _gate_backward, (tokens, cdiv(heads * d, block)), dy, o, gate, do, dgate,
            dy.stride(0), dy.stride(1), o.stride(0), o.stride(1), gate.stride(0), gate.stride(1),
            dgate.stride(0), dgate.stride(1), heads * d, D=d, BLOCK=block, num_warps=4,
        )  # fmt: skip
        return do, dgate
