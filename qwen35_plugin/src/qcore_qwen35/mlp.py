"""The SwiGLU feed-forward layer of Qwen 3.5: ``down(silu(gate(x)) * up(x))``.

This file decides that gate and up are stacked into one product, and that ``silu(gate) * up``
(`ops.swiglu`) is recomputed in backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from qcore.api import BuildContext
from qcore.ops import recompute

from .ops.swiglu.reference import swiglu


class Mlp(nn.Module):
    """``[T, H] -> [T, H]``."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

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
