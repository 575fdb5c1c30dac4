"""Triton kernels of the delta rule's inputs: convolution and gates, one launch each way.

This file decides that a program walks along the tokens of a strip of channels with the last inputs
in registers, so that every row is read once, and that in backward the derivative before SiLU is
computed once per token and added to the (up to four) rows it depends on. The convolution rounds
before SiLU as `reference` does; the backward is float32 throughout. Gradients of all projections
share one buffer (`qcore.ops.GradBuffers`).

The reference computes the gradients of trained weights. Shapes: T tokens, C channels
in the order q, k, v; four taps.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# Types of kernels are Triton's.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcore.ops import GradBuffers, tl, triton

from .. import limits
from ..launch import cdiv, launch, next_power_of_2, supported
from . import reference
from .reference import DeltaInputs, Documents, Heads

#: Channels and tokens per strip, warps per program.
FORWARD = (256, 32, 1)
BACKWARD = (256, 61, 1)


@triton.jit
def _forward(
    u_ptr, w_ptr, starts_ptr, y_ptr, a_ptr, b_ptr, log_ptr, bias_ptr, g_ptr, beta_ptr,
    u_row, a_row, b_row, channels, tokens, heads,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * LENGTH
    if tl.program_id(0) * BLOCK < channels:
        _conv_forward(
            u_ptr, w_ptr, starts_ptr, y_ptr, u_row, channels, tokens, first, LENGTH, BLOCK
        )
    else:
        _gates_forward(
            a_ptr, b_ptr, log_ptr, bias_ptr, g_ptr, beta_ptr, a_row, b_row, tokens, heads,
            first, LENGTH, HEADS,
        )  # fmt: skip


@triton.jit
def _conv_forward(
    u_ptr, w_ptr, starts_ptr, y_ptr, u_row, channels, tokens, first,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    half = y_ptr.dtype.element_ty
    w0 = tl.load(w_ptr + c * 4, mask=inside, other=0.0).to(half).to(tl.float32)
    w1 = tl.load(w_ptr + c * 4 + 1, mask=inside, other=0.0).to(half).to(tl.float32)
    w2 = tl.load(w_ptr + c * 4 + 2, mask=inside, other=0.0).to(half).to(tl.float32)
    w3 = tl.load(w_ptr + c * 4 + 3, mask=inside, other=0.0).to(half).to(tl.float32)
    start = tl.load(starts_ptr + first)
    u_ptr += c + first.to(tl.int64) * u_row
    y_ptr += c + first.to(tl.int64) * channels
    u1 = tl.load(u_ptr - u_row, mask=inside & (first - 1 >= start), other=0.0).to(tl.float32)
    u2 = tl.load(u_ptr - 2 * u_row, mask=inside & (first - 2 >= start), other=0.0).to(tl.float32)
    u3 = tl.load(u_ptr - 3 * u_row, mask=inside & (first - 3 >= start), other=0.0).to(tl.float32)
    # Four rows are loaded before the first is used: later loads cannot move above a store.
    for t in tl.range(first, tl.minimum(first + LENGTH, tokens), 4):
        m1, m2, m3 = t + 1 < tokens, t + 2 < tokens, t + 3 < tokens
        x0 = tl.load(u_ptr, mask=inside, other=0.0)
        x1 = tl.load(u_ptr + u_row, mask=inside & m1, other=0.0)
        x2 = tl.load(u_ptr + 2 * u_row, mask=inside & m2, other=0.0)
        x3 = tl.load(u_ptr + 3 * u_row, mask=inside & m3, other=0.0)
        f0 = tl.load(starts_ptr + t) == t
        f1 = tl.load(starts_ptr + t + 1, mask=m1, other=0) == t + 1
        f2 = tl.load(starts_ptr + t + 2, mask=m2, other=0) == t + 2
        f3 = tl.load(starts_ptr + t + 3, mask=m3, other=0) == t + 3
        p0, u1, u2, u3 = _taps(w0, w1, w2, w3, x0, u1, u2, u3, f0, half)
        tl.store(y_ptr, (p0 * tl.sigmoid(p0)).to(half), mask=inside)
        p1, u1, u2, u3 = _taps(w0, w1, w2, w3, x1, u1, u2, u3, f1, half)
        tl.store(y_ptr + channels, (p1 * tl.sigmoid(p1)).to(half), mask=inside & m1)
        p2, u1, u2, u3 = _taps(w0, w1, w2, w3, x2, u1, u2, u3, f2, half)
        tl.store(y_ptr + 2 * channels, (p2 * tl.sigmoid(p2)).to(half), mask=inside & m2)
        p3, u1, u2, u3 = _taps(w0, w1, w2, w3, x3, u1, u2, u3, f3, half)
        tl.store(y_ptr + 3 * channels, (p3 * tl.sigmoid(p3)).to(half), mask=inside & m3)
        u_ptr += 4 * u_row
        y_ptr += 4 * channels


@triton.jit
def _taps(w0, w1, w2, w3, x, u1, u2, u3, fresh, half: tl.constexpr):
    """The rounded sum over the taps, and the shifted inputs, which are zero before a document."""
    x = x.to(tl.float32)
    u1 = tl.where(fresh, 0.0, u1)
    u2 = tl.where(fresh, 0.0, u2)
    u3 = tl.where(fresh, 0.0, u3)
    return (w0 * u3 + w1 * u2 + w2 * u1 + w3 * x).to(half).to(tl.float32), x, u1, u2


@triton.jit
def _backward(
    dq_ptr, dk_ptr, dv_ptr, u_ptr, w_ptr, starts_ptr, du_ptr,
    dg_ptr, dbeta_ptr, a_ptr, b_ptr, log_ptr, bias_ptr, da_ptr, db_ptr,
    dq_row, dk_row, dv_row, u_row, du_row, dg_row, dbeta_row, a_row, b_row, da_row, db_row,
    keys, values, tokens, heads, LENGTH: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * LENGTH
    if tl.program_id(0) < tl.num_programs(0) - 1:
        _conv_backward(
            dq_ptr, dk_ptr, dv_ptr, u_ptr, w_ptr, starts_ptr, du_ptr,
            dq_row, dk_row, dv_row, u_row, du_row, keys, values, tokens, first, LENGTH, BLOCK,
        )  # fmt: skip
    else:
        _gates_backward(
            dg_ptr, dbeta_ptr, a_ptr, b_ptr, log_ptr, bias_ptr, da_ptr, db_ptr,
            dg_row, dbeta_row, a_row, b_row, da_row, db_row, tokens, heads, first, LENGTH, HEADS,
        )  # fmt: skip


@triton.jit
def _conv_backward(
    dq_ptr, dk_ptr, dv_ptr, u_ptr, w_ptr, starts_ptr, du_ptr,
    dq_row, dk_row, dv_row, u_row, du_row, keys, values, tokens, first,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    strips = (keys + BLOCK - 1) // BLOCK
    # Which of q, k, v contains the strip; its start there and among all channels.
    dy_ptr, dy_row, width, local, base = dq_ptr, dq_row, keys, strip, keys * 0
    if strip >= 2 * strips:
        dy_ptr, dy_row, width, local, base = dv_ptr, dv_row, values, strip - 2 * strips, 2 * keys
    elif strip >= strips:
        dy_ptr, dy_row, local, base = dk_ptr, dk_row, strip - strips, keys
    at = local * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    c = base + at
    half = du_ptr.dtype.element_ty
    w0 = tl.load(w_ptr + c * 4, mask=inside, other=0.0).to(half).to(tl.float32)
    w1 = tl.load(w_ptr + c * 4 + 1, mask=inside, other=0.0).to(half).to(tl.float32)
    w2 = tl.load(w_ptr + c * 4 + 2, mask=inside, other=0.0).to(half).to(tl.float32)
    w3 = tl.load(w_ptr + c * 4 + 3, mask=inside, other=0.0).to(half).to(tl.float32)
    start = tl.load(starts_ptr + first)
    u_ptr += c + first.to(tl.int64) * u_row
    dy_ptr += at + first.to(tl.int64) * dy_row
    du_ptr += c + (first.to(tl.int64) - 3) * du_row
    u1 = tl.load(u_ptr - u_row, mask=inside & (first - 1 >= start), other=0.0).to(tl.float32)
    u2 = tl.load(u_ptr - 2 * u_row, mask=inside & (first - 2 >= start), other=0.0).to(tl.float32)
    u3 = tl.load(u_ptr - 3 * u_row, mask=inside & (first - 3 >= start), other=0.0).to(tl.float32)
    # Partial gradients of u at t - 1, t - 2, t - 3.
    s1 = tl.zeros([BLOCK], tl.float32)
    s2 = tl.zeros([BLOCK], tl.float32)
    s3 = tl.zeros([BLOCK], tl.float32)
    last = tl.minimum(first + LENGTH, tokens)
    for t in tl.range(first, last + 3, 4):
        m0, m1, m2, m3 = t < tokens, t + 1 < tokens, t + 2 < tokens, t + 3 < tokens
        x0 = tl.load(u_ptr, mask=inside & m0, other=0.0)
        x1 = tl.load(u_ptr + u_row, mask=inside & m1, other=0.0)
        x2 = tl.load(u_ptr + 2 * u_row, mask=inside & m2, other=0.0)
        x3 = tl.load(u_ptr + 3 * u_row, mask=inside & m3, other=0.0)
        y0 = tl.load(dy_ptr, mask=inside & m0, other=0.0)
        y1 = tl.load(dy_ptr + dy_row, mask=inside & m1, other=0.0)
        y2 = tl.load(dy_ptr + 2 * dy_row, mask=inside & m2, other=0.0)
        y3 = tl.load(dy_ptr + 3 * dy_row, mask=inside & m3, other=0.0)
        n0 = t - tl.load(starts_ptr + t, mask=m0, other=0)
        n1 = t + 1 - tl.load(starts_ptr + t + 1, mask=m1, other=0)
        n2 = t + 2 - tl.load(starts_ptr + t + 2, mask=m2, other=0)
        n3 = t + 3 - tl.load(starts_ptr + t + 3, mask=m3, other=0)
        p0, u1, u2, u3 = _taps(w0, w1, w2, w3, x0, u1, u2, u3, n0 == 0, half)
        du, s1, s2, s3 = _spread(w0, w1, w2, w3, p0, y0, s1, s2, s3, n0)
        tl.store(du_ptr, du.to(half), mask=inside & (t - 3 >= first) & (t - 3 < last))
        p1, u1, u2, u3 = _taps(w0, w1, w2, w3, x1, u1, u2, u3, n1 == 0, half)
        du, s1, s2, s3 = _spread(w0, w1, w2, w3, p1, y1, s1, s2, s3, n1)
        tl.store(du_ptr + du_row, du.to(half), mask=inside & (t - 2 >= first) & (t - 2 < last))
        p2, u1, u2, u3 = _taps(w0, w1, w2, w3, x2, u1, u2, u3, n2 == 0, half)
        du, s1, s2, s3 = _spread(w0, w1, w2, w3, p2, y2, s1, s2, s3, n2)
        tl.store(du_ptr + 2 * du_row, du.to(half), mask=inside & (t - 1 >= first) & (t - 1 < last))
        p3, u1, u2, u3 = _taps(w0, w1, w2, w3, x3, u1, u2, u3, n3 == 0, half)
        du, s1, s2, s3 = _spread(w0, w1, w2, w3, p3, y3, s1, s2, s3, n3)
        tl.store(du_ptr + 3 * du_row, du.to(half), mask=inside & (t < last))
        u_ptr += 4 * u_row
        dy_ptr += 4 * dy_row
        du_ptr += 4 * du_row


@triton.jit
def _spread(w0, w1, w2, w3, pre, dy, s1, s2, s3, number):
    """Add one token's derivative to the rows it depends on; the oldest is then complete.

    `number`: index of the token in its document, which has no rows before the first.
    """
    open_ = tl.sigmoid(pre)
    d = dy.to(tl.float32) * open_ * (1 + pre * (1 - open_))
    s3 += tl.where(number >= 3, w0 * d, 0.0)
    s2 += tl.where(number >= 2, w1 * d, 0.0)
    s1 += tl.where(number >= 1, w2 * d, 0.0)
    return s3, w3 * d, s1, s2


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _gates_forward(
    a_ptr, b_ptr, log_ptr, bias_ptr, g_ptr, beta_ptr, a_row, b_row, tokens, heads, first,
    LENGTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)[None, :]
    rate = tl.exp(tl.load(log_ptr + head, mask=head < heads, other=0.0).to(tl.float32))
    bias = tl.load(bias_ptr + head, mask=head < heads, other=0.0).to(tl.float32)
    for step in tl.range(0, LENGTH, 8):
        token = first.to(tl.int64) + step + tl.arange(0, 8)[:, None]
        inside = (token < tokens) & (head < heads)
        a = tl.load(a_ptr + token * a_row + head, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + token * b_row + head, mask=inside, other=0.0).to(tl.float32)
        at = token * heads + head
        tl.store(g_ptr + at, -rate * _softplus(a + bias), mask=inside)
        tl.store(beta_ptr + at, tl.sigmoid(b).to(beta_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gates_backward(
    dg_ptr, dbeta_ptr, a_ptr, b_ptr, log_ptr, bias_ptr, da_ptr, db_ptr,
    dg_row, dbeta_row, a_row, b_row, da_row, db_row, tokens, heads, first,
    LENGTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)[None, :]
    rate = tl.exp(tl.load(log_ptr + head, mask=head < heads, other=0.0).to(tl.float32))
    bias = tl.load(bias_ptr + head, mask=head < heads, other=0.0).to(tl.float32)
    for step in tl.range(0, LENGTH, 8):
        token = first.to(tl.int64) + step + tl.arange(0, 8)[:, None]
        inside = (token < tokens) & (head < heads)
        dg = tl.load(dg_ptr + token * dg_row + head, mask=inside, other=0.0).to(tl.float32)
        dbeta = tl.load(dbeta_ptr + token * dbeta_row + head, mask=inside, other=0.0)
        a = tl.load(a_ptr + token * a_row + head, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + token * b_row + head, mask=inside, other=0.0).to(tl.float32)
        da = -dg * rate * tl.sigmoid(a + bias)
        beta = tl.sigmoid(b)
        db = dbeta.to(tl.float32) * beta * (1 - beta)
        tl.store(da_ptr + token * da_row + head, da.to(da_ptr.dtype.element_ty), mask=inside)
        tl.store(db_ptr + token * db_row + head, db.to(db_ptr.dtype.element_ty), mask=inside)


def delta_inputs(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    documents: Documents,
    heads: Heads,
) -> DeltaInputs:
    """`reference.delta_inputs`.

    Raises:
        UsageError: ``QC-KERNEL-003`` the convolution does not have four taps.
    """
    supported(qkv)
    limits.check("qwen35::delta_inputs", limits.taps(conv_weight.shape[-1]))
    return DeltaInputs(
        *_DeltaInputs.apply(qkv, z, a, b, conv_weight, a_log, dt_bias, documents, heads)  # type: ignore[no-untyped-call]
    )


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _DeltaInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        z: Tensor,
        a: Tensor,
        b: Tensor,
        conv_weight: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        documents: Documents,
        heads: Heads,
    ) -> tuple[Tensor, ...]:
        u, a, b = _rows(qkv), _rows(a), _rows(b)
        ctx.save_for_backward(u, a, b, conv_weight, a_log, dt_bias)
        ctx.slices = GradBuffers(u, z, a, b)
        ctx.documents, ctx.heads = documents, heads
        (tokens, channels), v_heads = u.shape, a.shape[1]
        mixed = u.new_empty(tokens, channels)
        g = a.new_empty(a.shape, dtype=torch.float32)
        beta = b.new_empty(b.shape)
        block, length, warps = FORWARD
        launch(
            _forward, (cdiv(channels, block) + 1, cdiv(tokens, length)),
            u, conv_weight, documents.starts, mixed, a, b, a_log, dt_bias, g, beta,
            u.stride(0), a.stride(0), b.stride(0), channels, tokens, v_heads,
            LENGTH=length, BLOCK=block, HEADS=next_power_of_2(v_heads), num_warps=warps,
        )  # fmt: skip
        return *heads.split(mixed), g, beta, z

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor, dbeta: Tensor, dz: Tensor
    ) -> tuple[Any, ...]:
        u, a, b, conv_weight, a_log, dt_bias = ctx.saved_tensors
        du, dz, da, db = ctx.slices.gradients(u, None, dz, None, None)
        parts = [_flat(x) for x in (dq, dk, dv)]
        keys, values = parts[0].shape[1], parts[2].shape[1]
        dg, dbeta = _rows(dg), _rows(dbeta)
        block, length, warps = BACKWARD
        strips = 2 * cdiv(keys, block) + cdiv(values, block)
        launch(
            _backward, (strips + 1, cdiv(len(u), length)), *parts, u, conv_weight,
            ctx.documents.starts, du, dg, dbeta, a, b, a_log, dt_bias, da, db,
            *(x.stride(0) for x in (*parts, u, du, dg, dbeta, a, b, da, db)),
            keys, values, len(u), a.shape[1],
            LENGTH=length, BLOCK=block, HEADS=next_power_of_2(a.shape[1]), num_warps=warps,
        )  # fmt: skip
        frozen = _frozen_gradients(ctx, parts, dg) if any(ctx.needs_input_grad[4:7]) else [None] * 3
        return du, dz, da, db, *frozen, None, None


def _flat(x: Tensor) -> Tensor:
    """``[T, heads, d] -> [T, heads * d]``; copies only if heads are not contiguous."""
    if x.stride(-1) != 1 or x.stride(-2) != x.shape[-1]:
        x = x.contiguous()
    return x.flatten(1)


def _frozen_gradients(ctx: Any, parts: list[Tensor], dg: Tensor) -> list[Tensor | None]:
    u, a, _, *weights = ctx.saved_tensors
    with torch.enable_grad():
        conv_weight, a_log, dt_bias = (w.detach().requires_grad_() for w in weights)
        y = reference.causal_conv_silu(u.detach(), conv_weight, ctx.documents.cu_seqlens)
        g = reference.log_decay(a.detach(), a_log, dt_bias)
    grads = torch.autograd.grad(
        (y, g), (conv_weight, a_log, dt_bias), (torch.cat(parts, 1).to(y.dtype), dg)
    )
    return [d if n else None for d, n in zip(grads, ctx.needs_input_grad[4:7], strict=True)]
