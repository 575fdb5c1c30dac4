"""`Stacked`: linear layers with the same input (q, k, v), on a GPU as one product by `fused`.

This file decides when the products of a stack are shared: on a GPU, unless a member draws dropout
(each member draws for itself, so each reads another x). Otherwise members are called one by one.
`fused` decides how the product is computed, `linear` how each map is alone.

Shapes: ``x [..., in]``, each map ``[out_i, in]``.
"""

from __future__ import annotations

from torch import Tensor

from .fused import Compute, Product, reference
from .linear import Linear


class Stacked:
    """``[..., in] -> ([..., out_i], ...)``; holds its members, owns none of their parameters.

    Args:
        members: maps of one input.
        compute: the op ``qlora_linear``.

    Call a 16-bit member through its stack or alone, not both: its weight lies in one buffer.
    Outputs of a shared product are column slices of one buffer. Their gradients cost no copy
    if they have the same layout (`grad_buffers`).
    """

    def __init__(self, members: tuple[Linear, ...], compute: Compute = reference) -> None:
        self.members = members
        self.product = Product(members, compute)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.product.takes(x):
            return self.product(x)
        return tuple(member(x) for member in self.members)
