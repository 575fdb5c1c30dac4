"""Triton kernel of the backward of DoRA's scaling: two gradients in one pass over ``dy`` and ``y``.

This file decides how many rows a program sums, and that sums over programs are taken in one order,
so that a step repeats bit for bit. `dora` says what the gradients are.

Shapes: T rows, N outputs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.language import tl, triton
from ..kernels.launch import cdiv, launch

#: (rows of a load, loads of a program, columns, warps)
TILE = (16, 16, 256, 4)


def scale_gradient(dy: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``dy * scale``, contiguous ``[T, N]``, and ``sum_t dy y``, float32 ``[N]``.

    Args:
        dy: ``[T, N]``; rows of this and of `y` may lie apart.
        y: ``[T, N]``
        scale: float32 ``[N]``.
    """
    (tokens, out), (rows, loads, columns, warps) = dy.shape, TILE
    scaled = dy.new_empty(tokens, out)
    programs = cdiv(tokens, rows * loads)
    dots = dy.new_empty(programs, out, dtype=torch.float32)
    launch(
        _scale_gradient, (cdiv(out, columns), programs),
        dy, y, scale, scaled, dots, tokens, out, dy.stride(0), y.stride(0),
        BM=rows, LOADS=loads, BN=columns, num_warps=warps,
    )  # fmt: skip
    return scaled, dots.sum(0)


@triton.jit(do_not_specialize=["tokens"])
def _scale_gradient(
    DY, Y, SCALE, SCALED, DOTS, tokens, out, stride_dy, stride_y,
    BM: tl.constexpr, LOADS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    real = n < out
    scale = tl.load(SCALE + n, mask=real, other=0.0)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    begin = tl.program_id(1).to(tl.int64) * (BM * LOADS)
    for load in range(LOADS):
        i = begin + load * BM + tl.arange(0, BM)
        here = (i < tokens)[:, None] & real[None, :]
        dy = tl.load(DY + i[:, None] * stride_dy + n[None, :], mask=here, other=0.0).to(tl.float32)
        y = tl.load(Y + i[:, None] * stride_y + n[None, :], mask=here, other=0.0).to(tl.float32)
        acc += dy * y
        scaled = (dy * scale).to(SCALED.dtype.element_ty)
        tl.store(SCALED + i[:, None] * out + n[None, :], scaled, mask=here)
    tl.store(DOTS + tl.program_id(1).to(tl.int64) * out + n, tl.sum(acc, 0), mask=real)
