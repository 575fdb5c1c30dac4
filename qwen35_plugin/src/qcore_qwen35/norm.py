"""RMSNorm and gated RMSNorm modules of Qwen 3.5, recomputed in backward instead of saved.

This file decides what is recomputed in backward (the output of every norm); `ops.norm` has the
formulas. `Weight` is a module with one parameter, which gives a tensor its checkpoint name
(``conv1d.weight``).

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
    """RMSNorm over the last dimension; the stored weight ``[d]`` is an offset from one."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

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
        """The residual stream ``x + delta`` (or x without delta) and its norm.

        Continue with the returned stream: its gradient and the norm's then take one pass.
        """
        x, y = self._add_norm(x, delta, self.weight, self.eps)
        return x, recomputable(y, self._norm, x, self.weight, self.eps)


class GatedNorm(nn.Module):
    """RMSNorm with SiLU gate per value head; all heads share the weight ``[dv]``."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, o: Tensor, z: Tensor) -> Tensor: ...

    def __init__(self, ctx: BuildContext, name: str, eps: float) -> None:
        super().__init__()
        self.weight = ctx.tensor(f"{name}.weight")
        self.eps = eps
        self._norm = ctx.kernel("qwen35::gated_norm", gated_norm)

    def forward(self, o: Tensor, z: Tensor) -> Tensor:
        return recompute(self._norm, o, z, self.weight, self.eps)
