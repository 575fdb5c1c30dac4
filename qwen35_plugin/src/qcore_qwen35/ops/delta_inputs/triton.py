"""What the delta rule reads, in Triton: one launch for the convolution, one for the gates.

This file decides that a program goes along the tokens of a strip of channels with the last
inputs in registers, so that every row is read once, and that backwards the derivative before
SiLU is computed once for each token and handed to the (up to four) rows that it came from. The
convolution rounds before SiLU as `reference` does; the backward is float32 throughout.
Gradients of all projections lie in one buffer (`qcore.nn.slices`).

Weights that are trained have their gradients from the reference. Shapes: T tokens, C channels
in the order q, k, v; four taps.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped"
# Types of kernels are Triton's.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcore.nn.slices import Slices

from ..launch import launch, supported
from . import reference
from .reference import DeltaInputs, Documents, Heads

TAPS = 4
#: Channels and tokens of a strip, warps of its program.
FORWARD = (256, 32, 1)
BACKWARD = (256, 32, 1)


@triton.jit
def _conv_forward(
    u_ptr, w_ptr, starts_ptr, y_ptr, u_row, channels, tokens,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    first = tl.program_id(1) * LENGTH
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
    for t in tl.range(first, tl.minimum(first + LENGTH, tokens), loop_unroll_factor=4):
        start = tl.load(starts_ptr + t)
        u0 = tl.load(u_ptr, mask=inside, other=0.0).to(tl.float32)
        keep = start != t
        u1 = tl.where(keep, u1, 0.0)
        u2 = tl.where(keep, u2, 0.0)
        u3 = tl.where(keep, u3, 0.0)
        pre = (w0 * u3 + w1 * u2 + w2 * u1 + w3 * u0).to(half).to(tl.float32)
        tl.store(y_ptr, (pre * tl.sigmoid(pre)).to(half), mask=inside)
        u3, u2, u1 = u2, u1, u0
        u_ptr += u_row
        y_ptr += channels


@triton.jit
def _conv_backward(
    dq_ptr, dk_ptr, dv_ptr, u_ptr, w_ptr, starts_ptr, du_ptr,
    dq_row, dk_row, dv_row, u_row, du_row, keys, values, tokens,
    LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(0)
    strips = (keys + BLOCK - 1) // BLOCK
    first = tl.program_id(1) * LENGTH
    # Which of q, k, v the strip lies in, where it begins there and among all channels.
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
    # Sums so far of the gradients of u at t - 1, t - 2, t - 3.
    s1 = tl.zeros([BLOCK], tl.float32)
    s2 = tl.zeros([BLOCK], tl.float32)
    s3 = tl.zeros([BLOCK], tl.float32)
    last = tl.minimum(first + LENGTH, tokens)
    for t in tl.range(first, last + 3, loop_unroll_factor=4):
        here = t < tokens
        start = tl.load(starts_ptr + t, mask=here, other=0)
        u0 = tl.load(u_ptr, mask=inside & here, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr, mask=inside & here, other=0.0).to(tl.float32)
        keep = start != t
        u1 = tl.where(keep, u1, 0.0)
        u2 = tl.where(keep, u2, 0.0)
        u3 = tl.where(keep, u3, 0.0)
        pre = (w0 * u3 + w1 * u2 + w2 * u1 + w3 * u0).to(half).to(tl.float32)
        open_ = tl.sigmoid(pre)
        d = dy * open_ * (1 + pre * (1 - open_))
        s3 += tl.where(t - 3 >= start, w0 * d, 0.0)
        s2 += tl.where(t - 2 >= start, w1 * d, 0.0)
        s1 += tl.where(t - 1 >= start, w2 * d, 0.0)
        tl.store(du_ptr, s3.to(half), mask=inside & (t - 3 >= first))
        s3, s2, s1 = s2, s1, w3 * d
        u3, u2, u1 = u2, u1, u0
        u_ptr += u_row
        dy_ptr += dy_row
        du_ptr += du_row


@triton.jit
def _softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _gates_forward(
    a_ptr, b_ptr, log_ptr, bias_ptr, g_ptr, beta_ptr, a_row, b_row, total,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    token, head = at // HEADS, at % HEADS
    a = tl.load(a_ptr + token * a_row + head, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + token * b_row + head, mask=inside, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(log_ptr + head, mask=inside, other=0.0).to(tl.float32))
    bias = tl.load(bias_ptr + head, mask=inside, other=0.0).to(tl.float32)
    tl.store(g_ptr + at, -rate * _softplus(a + bias), mask=inside)
    tl.store(beta_ptr + at, tl.sigmoid(b).to(beta_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gates_backward(
    dg_ptr, dbeta_ptr, a_ptr, b_ptr, log_ptr, bias_ptr, da_ptr, db_ptr,
    dg_row, dbeta_row, a_row, b_row, da_row, db_row, total,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    token, head = at // HEADS, at % HEADS
    dg = tl.load(dg_ptr + token * dg_row + head, mask=inside, other=0.0).to(tl.float32)
    dbeta = tl.load(dbeta_ptr + token * dbeta_row + head, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + token * a_row + head, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + token * b_row + head, mask=inside, other=0.0).to(tl.float32)
    rate = tl.exp(tl.load(log_ptr + head, mask=inside, other=0.0).to(tl.float32))
    bias = tl.load(bias_ptr + head, mask=inside, other=0.0).to(tl.float32)
    da = -dg * rate * tl.sigmoid(a + bias)
    beta = tl.sigmoid(b)
    db = dbeta * beta * (1 - beta)
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
        ValueError: where the convolution has not four taps.
    """
    supported(qkv)
    if conv_weight.shape[-1] != TAPS:
        raise ValueError(f"no Triton kernel for {conv_weight.shape[-1]} taps: use the reference")
    return DeltaInputs(
        *_DeltaInputs.apply(qkv, z, a, b, conv_weight, a_log, dt_bias, documents, heads)
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
        ctx.slices = Slices(u, z, a, b)
        ctx.documents, ctx.heads = documents, heads
        tokens, channels = u.shape
        mixed = u.new_empty(tokens, channels)
        block, length, warps = FORWARD
        launch(
            _conv_forward, (triton.cdiv(channels, block), triton.cdiv(tokens, length)),
            u, conv_weight, documents.starts, mixed, u.stride(0), channels, tokens,
            LENGTH=length, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        g = a.new_empty(a.shape, dtype=torch.float32)
        beta = b.new_empty(b.shape)
        launch(
            _gates_forward, (triton.cdiv(g.numel(), 1024),),
            a, b, a_log, dt_bias, g, beta, a.stride(0), b.stride(0), g.numel(),
            HEADS=a.shape[1], BLOCK=1024, num_warps=4,
        )  # fmt: skip
        return *heads.split(mixed), g, beta, z

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, dg: Tensor, dbeta: Tensor, dz: Tensor
    ) -> tuple[Any, ...]:
        u, a, b, conv_weight, a_log, dt_bias = ctx.saved_tensors
        du, dz, da, db = ctx.slices.gradients(u, None, dz, None, None)
        parts = [_flat(one) for one in (dq, dk, dv)]
        keys, values = parts[0].shape[1], parts[2].shape[1]
        block, length, warps = BACKWARD
        strips = 2 * triton.cdiv(keys, block) + triton.cdiv(values, block)
        launch(
            _conv_backward, (strips, triton.cdiv(len(u), length)),
            *parts, u, conv_weight, ctx.documents.starts, du,
            *(one.stride(0) for one in parts), u.stride(0), du.stride(0), keys, values, len(u),
            LENGTH=length, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        dg, dbeta = _rows(dg), _rows(dbeta)
        launch(
            _gates_backward, (triton.cdiv(a.numel(), 1024),),
            dg, dbeta, a, b, a_log, dt_bias, da, db, dg.stride(0), dbeta.stride(0),
            a.stride(0), b.stride(0), da.stride(0), db.stride(0), a.numel(),
            HEADS=a.shape[1], BLOCK=1024, num_warps=4,
        )  # fmt: skip
        frozen = _frozen_gradients(ctx, parts, dg) if any(ctx.needs_input_grad[4:7]) else [None] * 3
        return du, dz, da, db, *frozen, None, None


def _flat(x: Tensor) -> Tensor:
    """``[T, heads, d] -> [T, heads * d]``; a copy only where heads lie apart."""
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
