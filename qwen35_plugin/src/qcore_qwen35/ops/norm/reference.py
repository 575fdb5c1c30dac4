"""Reference of the norms: RMSNorm with weight ``1 + w``, after a residual addition, and gated.

This file decides their formulas and the order of their roundings (float32 inside, one
rounding at the end; the gated norm also rounds before its weight), and that only the inputs are
saved for backward.

Shapes: ``[..., d]``, normalized over d.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def scale_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor on a normalized row: the stored weight is an offset from one."""
    return 1 + weight.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * (1 + w)`` in float32, rounded to the dtype of x last."""
    out: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``x + delta`` (or x) and its `rms_norm`, so that both share one gradient."""
    if delta is not None:
        x = x + delta
    return x, rms_norm(x, weight, eps)


def gated_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``o / rms(o) * w * silu(z)``: the norm comes before the gate, and rounds before w."""
    out: Tensor = _GatedNorm.apply(o, z, weight, eps)  # type: ignore[no-untyped-call]
    return out


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()


def _through_rms(dy: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x from dy, the gradient of ``unit = x * inverse``; overwrites dy."""
    along = (dy * unit).mean(-1, keepdim=True)
    return dy.addcmul_(unit, along, value=-1).mul_(inverse)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        wide = _wide(x)
        y = wide * _inverse_rms(wide, eps)
        return y.mul_(scale_of(weight, y.dtype)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = _wide(x)
        inverse = _inverse_rms(wide, ctx.eps)
        unit = wide * inverse
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (_wide(dy) * unit).flatten(0, -2).sum(0).to(weight.dtype)
        dunit = _wide(dy) * scale_of(weight, wide.dtype)
        return _through_rms(dunit, unit, inverse).to(x.dtype), dweight, None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(o, z, weight)
        ctx.eps = eps
        wide = _wide(o)
        unit = (wide * _inverse_rms(wide, eps)).to(o.dtype)
        return (F.silu(_wide(z)) * (unit * weight.to(o.dtype))).to(o.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        o, z, weight = ctx.saved_tensors
        wide, gate, dy = _wide(o), _wide(z), _wide(dy)
        inverse = _inverse_rms(wide, ctx.eps)
        unit = wide * inverse
        w = weight.to(wide.dtype)
        dz = torch.ops.aten.silu_backward(dy * unit * w, gate).to(z.dtype)
        dunit = F.silu(gate).mul_(dy)
        dweight = None
        if ctx.needs_input_grad[2]:
            dweight = (dunit * unit).flatten(0, -2).sum(0).to(weight.dtype)
        return _through_rms(dunit.mul_(w), unit, inverse).to(o.dtype), dz, dweight, None
