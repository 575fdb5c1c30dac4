"""The SwiGLU feed-forward map: ``down(silu(gate(x)) * up(x))``.

This file decides that the product is one function that saves gate and up alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qcore.nn.protocols import BuildContext


class Mlp(nn.Module):
    """``[T, H] -> [T, H]``."""

    def __init__(self, ctx: BuildContext, name: str) -> None:
        super().__init__()
        self.gate_proj = ctx.linear(f"{name}.gate_proj")
        self.up_proj = ctx.linear(f"{name}.up_proj")
        self.down_proj = ctx.linear(f"{name}.down_proj")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``; SiLU is rounded before the product."""
    out: Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def gated_up(gate_up: Tensor) -> Tensor:
    """`swiglu` of ``[..., 2 I]`` whose first half is the gate; saves its input alone."""
    out: Tensor = _GatedUp.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, F.silu(gate).mul_(dy)


class _GatedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, -1)
        dgate.copy_(torch.ops.aten.silu_backward(dy * up, gate))
        torch.mul(F.silu(gate), dy, out=dup)
        return out
