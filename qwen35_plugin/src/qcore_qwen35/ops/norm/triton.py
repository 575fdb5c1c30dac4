"""Triton kernels of the norms: one row per program, float32 inside, one pass each way.

This file decides the block sizes. The forward rounds as `reference`, the backward is float32
throughout. Inputs may be row-strided; the gradient of z has the layout of z
(`qcore.ops.GradBuffers`). The gradient of a trained weight is computed by the reference's formula.

Shapes: R rows of d.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
# Types of kernels are Triton's.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qcore.ops import GradBuffers, tl, triton

from ..launch import cdiv, launch, next_power_of_2, rows_of, supported

#: Elements per tile of the gated norm, whose rows are short.
TILE = 2048


@triton.jit
def _norm_forward(
    x_ptr, delta_ptr, w_ptr, sum_ptr, y_ptr, x_row, delta_row, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + row * delta_row + cols, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + cols, rounded, mask=inside)
        x = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    y = (x * inverse) * (1 + w)
    tl.store(y_ptr + row * width + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    dy_ptr, x_ptr, w_ptr, dsum_ptr, dx_ptr, dy_row, x_row, dsum_row, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_row + cols, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    unit = x * inverse
    dunit = dy * (1 + w)
    dx = (dunit - unit * (tl.sum(dunit * unit, 0) / width)) * inverse
    if ADD:
        dx += tl.load(dsum_ptr + row * dsum_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * width + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_forward(
    o_ptr, z_ptr, w_ptr, y_ptr, o_row, z_row, rows, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (cols < WIDTH)
    token, at = row // HEADS, (row % HEADS) * WIDTH + cols
    half = y_ptr.dtype.element_ty
    o = tl.load(o_ptr + token * o_row + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + token * z_row + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + cols, mask=cols < WIDTH, other=0.0).to(half).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(o * o, 1) / WIDTH + eps)[:, None]
    unit = (o * inverse).to(half).to(tl.float32)
    scaled = (unit * w).to(half).to(tl.float32)
    y = z * tl.sigmoid(z) * scaled
    tl.store(y_ptr + row * WIDTH + cols, y.to(half), mask=inside)


@triton.jit
def _gated_backward(
    dy_ptr, o_ptr, z_ptr, w_ptr, do_ptr, dz_ptr, dy_row, o_row, z_row, dz_row, rows, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (cols < WIDTH)
    token, at = row // HEADS, (row % HEADS) * WIDTH + cols
    dy = tl.load(dy_ptr + token * dy_row + at, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(o_ptr + token * o_row + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + token * z_row + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(o * o, 1) / WIDTH + eps)[:, None]
    unit = o * inverse
    open_ = tl.sigmoid(z)
    dz = dy * unit * w * open_ * (1 + z * (1 - open_))
    dunit = dy * z * open_ * w
    along = (tl.sum(dunit * unit, 1) / WIDTH)[:, None]
    do = (dunit - unit * along) * inverse
    tl.store(dz_ptr + token * dz_row + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(do_ptr + row * WIDTH + cols, do.to(do_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`."""
    out: Tensor = _AddNorm.apply(x, None, weight, eps)[1]  # type: ignore[no-untyped-call]
    return out


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`."""
    out: tuple[Tensor, Tensor] = _AddNorm.apply(x, delta, weight, eps)  # type: ignore[no-untyped-call]
    return out


def gated_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.gated_norm`, o and z ``[..., heads, d]``."""
    out: Tensor = _GatedNorm.apply(o, z, weight, eps)  # type: ignore[no-untyped-call]
    return out


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        supported(x)
        flat = rows_of(x)
        rows, width = flat.shape
        other = flat if delta is None else rows_of(delta)
        total = flat if delta is None else flat.new_empty(rows, width)
        y = flat.new_empty(rows, width)
        block = next_power_of_2(width)
        launch(
            _norm_forward, (rows,), flat, other, weight, total, y,
            flat.stride(0), other.stride(0), width, eps,
            ADD=delta is not None, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return x if delta is None else total.view(x.shape), y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        if dy is None:
            return dsum, dsum if ctx.needs_input_grad[1] else None, None, None
        shape, flat = dy.shape, rows_of(dy)
        dweight = _weight_gradient(flat, x, weight, ctx.eps) if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            rows, width = flat.shape
            dx = flat.new_empty(rows, width, dtype=x.dtype)
            other = flat if dsum is None else rows_of(dsum)
            block = next_power_of_2(width)
            launch(
                _norm_backward, (rows,), flat, x, weight, other, dx,
                flat.stride(0), x.stride(0), other.stride(0), width, ctx.eps,
                ADD=dsum is not None, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
            dx = dx.view(shape)
        needs_x, needs_delta = ctx.needs_input_grad[:2]
        return dx if needs_x else None, dx if needs_delta else None, dweight, None


def _unit(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * wide.pow(2).mean(-1, keepdim=True).add(eps).rsqrt()


def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (dy.float() * _unit(x, eps)).sum(0).to(weight.dtype)


def _by_token(x: Tensor) -> Tensor:
    """``[..., heads, d] -> [tokens, heads * d]``; copies only if heads are not contiguous."""
    heads, d = x.shape[-2:]
    if x.stride(-1) != 1 or x.stride(-2) != d:
        x = x.contiguous()
    return x.reshape(-1, heads * d)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        supported(o, z)
        heads, d = o.shape[-2:]
        flat_o, flat_z = _by_token(o), _by_token(z)
        y = flat_o.new_empty(o.shape)
        ctx.save_for_backward(flat_o, flat_z, weight)
        ctx.eps, ctx.shape, ctx.slices = eps, o.shape, GradBuffers(flat_z)
        rows = flat_o.shape[0] * heads
        block, tile, warps = _gated_tile(d)
        launch(
            _gated_forward, (cdiv(rows, tile),), flat_o, flat_z, weight, y,
            flat_o.stride(0), flat_z.stride(0), rows, eps,
            HEADS=heads, WIDTH=d, ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        o, z, weight = ctx.saved_tensors
        heads, d = ctx.shape[-2:]
        flat = _by_token(dy)
        do = o.new_empty(ctx.shape)
        (dz,) = ctx.slices.gradients(z, None)
        rows = o.shape[0] * heads
        block, tile, warps = _gated_tile(d)
        launch(
            _gated_backward, (cdiv(rows, tile),), flat, o, z, weight, do, dz,
            flat.stride(0), o.stride(0), z.stride(0), dz.stride(0), rows, ctx.eps,
            HEADS=heads, WIDTH=d, ROWS=tile, BLOCK=block, num_warps=warps,
        )  # fmt: skip
        dweight = None
        if ctx.needs_input_grad[2]:
            gate = torch.nn.functional.silu(z.float()) * flat.float()
            unit = _unit(o.view(-1, heads, d), ctx.eps)
            dweight = (gate.view(-1, heads, d) * unit).sum((0, 1)).to(weight.dtype)
        return do, dz.unflatten(-1, (heads, d)).view(ctx.shape), dweight, None


def _gated_tile(d: int) -> tuple[int, int, int]:
    """Columns, rows and warps per tile of the gated norm."""
    block = next_power_of_2(d)
    return block, max(1, TILE // block), 8
