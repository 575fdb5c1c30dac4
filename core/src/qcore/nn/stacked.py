"""Linear maps that read the same x, computed as one.

This file decides how the products of a stack are shared; each map alone is `linear`'s.

Shapes: ``x [..., in]``, each map ``[out_i, in]``.
"""

from __future__ import annotations

from torch import Tensor

from .linear import Linear


class Stacked:
    """``[..., in] -> ([..., out_i], ...)``; holds its members, owns none of their parameters."""

    def __init__(self, members: tuple[Linear, ...]) -> None:
        self.members = members

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(member(x) for member in self.members)
