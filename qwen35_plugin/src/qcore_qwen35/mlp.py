"""The SwiGLU feed-forward map: ``down(silu(gate(x)) * up(x))``.

This file decides that gate and up are one stacked map and that their product is recomputed
in backward; the product is `ops.swiglu`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from qcore.api import BuildContext
from qcore.ops import recompute

from .ops.swiglu.reference import swiglu


class Mlp(nn.Module):
    """``[T, H] -> [T, H]``."""

    if TYPE_CHECKING:  # nn.Module's own is of any type

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, ctx: BuildContext, name: str) -> None:
        super().__init__()
        self.gate_proj = ctx.linear(f"{name}.gate_proj")
        self.up_proj = ctx.linear(f"{name}.up_proj")
        self.down_proj = ctx.linear(f"{name}.down_proj")
        self._gate_up = ctx.stack(self.gate_proj, self.up_proj)
        self._swiglu = ctx.kernel("qwen35::swiglu", swiglu)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(recompute(self._swiglu, *self._gate_up(x)))
