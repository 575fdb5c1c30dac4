"""Linear layers with a bias and LayerNorm for the vision tower, built on core's bias-free linears.

This file decides that a bias is a frozen tensor next to its linear layer's weight, and that it is
added in float32 together with the next operation (a residual or an activation). A 16-bit result is
then rounded as often as in a linear layer that adds its own bias.

Shapes: U patches, d features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qcore.api import BuildContext, LinearLayer
from qcore.ops import recompute

_EPS = 1e-6  # of every norm; not in config.json


def linear(ctx: BuildContext, name: str) -> LinearLayer:
    """The linear layer of row ``{name}.weight``, with row ``{name}.bias`` registered as ``bias``.

    The layer does not add the bias itself: `affine`, `residual` and `activated` do.
    """
    layer = ctx.linear(name)
    layer.register_parameter("bias", ctx.tensor(f"{name}.bias"))
    return layer


def affine(layer: LinearLayer, x: Tensor) -> Tensor:
    """``x W^T + b`` for a layer from `linear`: ``[..., in] -> [..., out]``."""
    y = layer(x)
    return biased(y, layer).to(y.dtype)


def residual(stream: Tensor, layer: LinearLayer, x: Tensor) -> Tensor:
    """``stream + x W^T + b``."""
    return (biased(layer(x), layer) + stream).to(stream.dtype)


def activated(layer: LinearLayer, x: Tensor, approximate: str) -> Tensor:
    """``gelu(x W^T + b)``; recomputed in backward."""
    return recompute(_gelu, layer(x), layer.get_parameter("bias"), approximate)


def biased(y: Tensor, layer: LinearLayer) -> Tensor:
    """``y + b`` in float32, or float64 for float64 inputs."""
    return y + layer.get_parameter("bias").to(_wide(y))


def _wide(y: Tensor) -> torch.dtype:
    return torch.promote_types(y.dtype, torch.float32)


def _gelu(y: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """``gelu(y + bias)``; saves y.

    Args:
        y: ``[U, d]``.
        bias: ``[d]``.
        approximate: ``none`` or ``tanh``, as in torch.
    """
    out: Tensor = _Gelu.apply(y, bias, approximate)  # type: ignore[no-untyped-call]
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(y, bias)
        ctx.approximate = approximate
        h = y + bias.to(_wide(y))
        torch.ops.aten.gelu_(h, approximate=approximate)
        return h.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor | None, None]:
        y, bias = ctx.saved_tensors
        wide = _wide(y)
        h = y + bias.to(wide)
        dy = torch.ops.aten.gelu_backward(dout.to(wide), h, approximate=ctx.approximate)
        dbias = dy.sum(0).to(bias.dtype) if ctx.needs_input_grad[1] else None
        return dy.to(y.dtype), dbias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the last dimension, in the dtype of x."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), _EPS)


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension; its output is recomputed in backward."""

    if TYPE_CHECKING:  # nn.Module's own is of any type

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, ctx: BuildContext, name: str) -> None:
        super().__init__()
        self.weight = ctx.tensor(f"{name}.weight")
        self.bias = ctx.tensor(f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        return recompute(layer_norm, x, self.weight, self.bias)
