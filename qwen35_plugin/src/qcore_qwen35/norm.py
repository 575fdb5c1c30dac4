"""The norms as modules: a weight, and the backend of its op.

This file decides what is recomputed in backward (every norm's result); the formulas are
`ops.norm`'s.

Shapes: ``[..., d]``, normalized over d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from qcore.api import BuildContext
from qcore.ops import recomputable, recompute

from .ops.norm.reference import add_rms_norm, gated_norm, rms_norm


class Weight(nn.Module):
    """One parameter named ``weight``: gives it its checkpoint name, as in ``conv1d.weight``."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class RmsNorm(nn.Module):
    """RMSNorm over the last dimension, weight ``[d]`` stored as the distance from one."""

    if TYPE_CHECKING:  # nn.Module's own is of any type

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, ctx: BuildContext, name: str, eps: float) -> None:
        super().__init__()
        self.weight = ctx.tensor(f"{name}.weight")
        self.eps = eps
        self._norm = ctx.kernel("qwen35::rms_norm", rms_norm)
        self._add_norm = ctx.kernel("qwen35::add_rms_norm", add_rms_norm)

    def forward(self, x: Tensor) -> Tensor:
        return recompute(self._norm, x, self.weight, self.eps)

    def after(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The residual stream ``x + delta`` (x without delta) and its norm.

        Go on with the stream that is returned: its gradient and the norm's are then one pass.
        """
        x, y = self._add_norm(x, delta, self.weight, self.eps)
        return x, recomputable(y, self._norm, x, self.weight, self.eps)


class GatedNorm(nn.Module):
    """RMSNorm and SiLU gate of one value head; the weight ``[dv]`` is shared by all heads."""

    if TYPE_CHECKING:  # nn.Module's own is of any type

        def __call__(self, o: Tensor, z: Tensor) -> Tensor: ...

    def __init__(self, ctx: BuildContext, name: str, eps: float) -> None:
        super().__init__()
        self.weight = ctx.tensor(f"{name}.weight")
        self.eps = eps
        self._norm = ctx.kernel("qwen35::gated_norm", gated_norm)

    def forward(self, o: Tensor, z: Tensor) -> Tensor:
        return recompute(self._norm, o, z, self.weight, self.eps)
