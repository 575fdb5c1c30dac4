"""Triton kernels of SwiGLU: ``silu(gate) * up``, one pass each way, both gradients in one buffer.

This file decides the block sizes. SiLU is rounded before the product as in `reference`; the
backward is float32 throughout.

Shapes: R rows, I columns; gate and up may be column slices of one ``[R, 2 I]``.
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

BLOCK = 1024
WARPS = 4


@triton.jit
def _forward(gate_ptr, up_ptr, y_ptr, gate_row, up_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    half = y_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(half).to(tl.float32)
    tl.store(y_ptr + row * width + cols, (silu * up).to(half), mask=inside)


@triton.jit
def _backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    dy_row, gate_row, up_row, dgate_row, dup_row, width, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    half = dgate_ptr.dtype.element_ty
    dy = tl.load(dy_ptr + row * dy_row + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    dgate = dy * up * open_ * (1 + gate * (1 - open_))
    tl.store(dgate_ptr + row * dgate_row + cols, dgate.to(half), mask=inside)
    tl.store(dup_ptr + row * dup_row + cols, (dy * gate * open_).to(half), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`reference.swiglu`."""
    out: Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def _product(gate: Tensor, up: Tensor) -> Tensor:
    rows, width = gate.shape
    y = gate.new_empty(rows, width)
    block = min(BLOCK, next_power_of_2(width))
    launch(
        _forward, (rows, cdiv(width, block)), gate, up, y,
        gate.stride(0), up.stride(0), width, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return y


def _gradients(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    rows, width = gate.shape
    block = min(BLOCK, next_power_of_2(width))
    launch(
        _backward, (rows, cdiv(width, block)), dy, gate, up, dgate, dup,
        dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0), dup.stride(0), width,
        BLOCK=block, num_warps=WARPS,
    )  # fmt: skip


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        supported(gate, up)
        ctx.shape = gate.shape
        gate, up = rows_of(gate), rows_of(up)
        ctx.save_for_backward(gate, up)
        ctx.slices = GradBuffers(gate, up)
        return _product(gate, up).view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = ctx.slices.gradients(gate, None, None)
        _gradients(rows_of(dy), gate, up, dgate, dup)
        return _shaped(dgate, ctx.shape), _shaped(dup, ctx.shape)


def _shaped(x: Tensor, shape: torch.Size) -> Tensor:
    return x if x.dim() == len(shape) else x.view(shape)
