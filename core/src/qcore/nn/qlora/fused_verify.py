"""Verification of a backend of the op ``qlora_linear`` (the fused product) against float32.

This file decides the cases: a stack that is wider than its input and one that is narrower, of 4-bit
and 16-bit maps, with and without DoRA, whose gradients are added where the optimizer keeps them; a
number of rows that no tile divides. Weights must be read bit for bit; the rest is compared with
float32 by the measure of `kernels.compare`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...api.records import Verdict
from ..kernels.compare import poison, relative_error
from ..optim import FlatAdamW
from .fused import Product
from .fused_triton import FEWEST, TritonKernels, linear
from .linear import Linear
from .lora_layer import Lora

_R16, _R8 = Lora(r=16, lora_alpha=32), Lora(r=8, lora_alpha=8)
_DORA = Lora(r=16, lora_alpha=32, use_dora=True)
#: (in, [(out, LoRA, 4-bit)])
_STACKS = (
    (320, [(384, _R16, True), (192, _R8, True), (40, None, False)]),
    (512, [(256, _R16, True)]),
    (320, [(384, _DORA, True), (40, None, False)]),
    (512, [(256, _DORA, True)]),
)
_BOUND = 8e-3  # of bf16; 5e-3 is usual
_DTYPE = torch.bfloat16


def verify(device: torch.device) -> Verdict:
    """The worst error of outputs and gradients; infinite where a weight differs by a bit."""
    output = gradient = 0.0
    for into, sizes in _STACKS:
        maps = [_member(into, *size, seed, device) for seed, size in enumerate(sizes)]
        if not _reads(maps, device):
            output = float("inf")
        computed, expected = _computed(maps, into, device), _expected(maps, into, device)
        errors = [relative_error(*pair) for pair in zip(computed, expected, strict=True)]
        output = max([output, *errors[: len(maps)]])
        gradient = max([gradient, *errors[len(maps) :]])
    return Verdict(output=output, output_bound=_BOUND, gradient=gradient, gradient_bound=_BOUND)


def _member(
    into: int, out: int, lora: Lora | None, four_bit: bool, seed: int, device: torch.device
) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(out, into, generator=generator) / into**0.5
    module = Linear((out, into), _DTYPE, lora)
    module.hold(slice(0, out), value.to(device, _DTYPE), quantize=four_bit, dtype=_DTYPE)
    module.reset_lora(str(seed), 0, device)
    if module.lora_B is not None:
        module.lora_B.data.copy_(torch.randn(module.lora_B.shape, generator=generator))
    if module.lora_magnitude_vector is not None:
        module.lora_magnitude_vector.data.mul_(0.5)  # so that it is far from the norm
    return module


def _reads(maps: list[Linear], device: torch.device) -> bool:
    """Whether all bits of what a product reads are what torch's reading gives."""
    like = torch.empty(0, dtype=_DTYPE, device=device)
    buffers = []
    for maker in (None, TritonKernels()):
        product = Product(maps)
        poison(device)
        working = product.working(like, maker)
        buffers.append(product.buffer(working, like, maker))
    return torch.equal(*buffers)


def _inputs(maps: list[Linear], into: int, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(into)
    tokens = FEWEST + 67
    x = torch.randn(tokens, into, generator=generator).to(device, _DTYPE)
    wide = torch.randn(tokens, sum(member.shape[0] for member in maps), generator=generator)
    grads = torch.split(wide.to(device, _DTYPE), [member.shape[0] for member in maps], 1)
    return x.requires_grad_(), list(grads)


def _computed(maps: list[Linear], into: int, device: torch.device) -> list[Tensor]:
    carried = [member for member in maps if member.lora is not None]
    FlatAdamW(carried, lr=0.0, weight_decay=0.0)
    product = Product(maps)
    product.compute = linear
    x, grads = _inputs(maps, into, device)
    poison(device)
    y = product(x)
    poison(device)
    torch.autograd.backward(y, grads)
    assert x.grad is not None
    matrices = [matrix for member in carried for matrix in member.factors]
    return [
        *y,
        x.grad,
        *(matrix.grad for matrix in matrices if matrix.grad is not None),
    ]


def _expected(maps: list[Linear], into: int, device: torch.device) -> list[Tensor]:
    x, grads = _inputs(maps, into, device)
    x = x.detach().float().requires_grad_()
    outputs, leaves = [], []
    for member in maps:
        y = x @ member.dense().float().t()
        if member.lora is not None:
            assert member.lora_A is not None
            assert member.lora_B is not None
            a, b = (m.detach().clone().requires_grad_() for m in (member.lora_A, member.lora_B))
            y = y + (x @ a.t()) @ b.t() * member.lora.scaling
            leaves += [a, b]
            if member.lora_magnitude_vector is not None:
                m = member.lora_magnitude_vector.detach().clone().requires_grad_()
                weight = member.dense().float() + member.lora.scaling * (b @ a).detach()
                y = y * (m / weight.norm(dim=1))
                leaves.append(m)
        outputs.append(y)
    torch.autograd.backward(outputs, [grad.float() for grad in grads])
    return [*outputs, x.grad, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]
