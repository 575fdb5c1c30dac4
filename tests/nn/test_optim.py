"""One vector against torch's AdamW over a list: the same values, bit for bit."""

from __future__ import annotations

import torch
from torch import nn

from qcore.nn.optim import FlatAdamW
from qcore.nn.qlora.fused import Product
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora

CPU = torch.device("cpu")
SHAPES = [(96, 64), (33, 64), (17, 30)]


def maps(seed: int = 0) -> list[Linear]:
    out = []
    for number, shape in enumerate(SHAPES):
        module = Linear(shape, torch.float32, Lora(r=3 if number == 2 else 4, lora_alpha=8))
        generator = torch.Generator().manual_seed(seed + number)
        value = torch.randn(shape, generator=generator)
        module.hold(slice(0, shape[0]), value, quantize=False, dtype=torch.float32)
        module.reset_lora(str(number), seed, CPU)
        nn.init.normal_(module.lora_B, generator=generator)  # type: ignore[arg-type]
        out.append(module)
    return out


def parameters(modules: list[Linear]) -> list[nn.Parameter]:
    return [m for one in modules for m in (one.lora_A, one.lora_B) if m is not None]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in parameters(maps())]


def run(modules: list[Linear], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters(modules), gradients(step), strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def torchs(modules: list[Linear]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters(modules), lr=0.1, weight_decay=0.05)


def ours(modules: list[Linear]) -> FlatAdamW:
    return FlatAdamW(modules, lr=0.1, weight_decay=0.05)


def test_values_and_moments_are_torchs():
    mine, theirs = maps(), maps()
    a, b = ours(mine), torchs(theirs)
    run(mine, a, range(4))
    run(theirs, b, range(4))
    for p, q in zip(parameters(mine), parameters(theirs), strict=True):
        assert torch.equal(p, q)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(a.state[p][key], b.state[q][key])


def test_moments_go_from_one_to_the_other():
    whole, first, second = maps(), maps(), maps()
    run(whole, torchs(whole), range(5))
    a = ours(first)
    run(first, a, range(2))
    b = ours(second)
    for p, q in zip(parameters(first), parameters(second), strict=True):
        with torch.no_grad():
            q.copy_(p)
        for key, value in a.state[p].items():  # as `state` restores them
            b.state[q][key] = value.clone()
    run(second, b, range(2, 5))
    for p, q in zip(parameters(whole), parameters(second), strict=True):
        assert torch.equal(p, q)


def test_clip_is_torchs():
    mine, theirs = maps(), maps()
    a = ours(mine)
    for p, q, g in zip(parameters(mine), parameters(theirs), gradients(0), strict=True):
        p.grad += g  # type: ignore[operator]
        q.grad = g.clone()
    norm = nn.utils.clip_grad_norm_(parameters(theirs), 0.5)
    assert torch.allclose(a.clip(0.5), norm, rtol=1e-6)
    for p, q in zip(parameters(mine), parameters(theirs), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-5)  # type: ignore[arg-type]
    assert float(a.clip(0)) > 0.49  # 0: no limit
    a.zero_grad()
    assert not any(p.grad.any() for p in parameters(mine))  # type: ignore[union-attr]


def test_all_is_in_one_vector_and_neighbours_touch():
    modules = maps()
    before = [p.detach().clone() for p in parameters(modules)]
    optimizer = ours(modules)
    home = optimizer.flat.untyped_storage().data_ptr()
    for p, value in zip(parameters(modules), before, strict=True):
        assert torch.equal(p, value)
        assert p.requires_grad
        assert p.is_leaf
        assert p.untyped_storage().data_ptr() == home
    one, other = modules[0].lora_A, modules[1].lora_A
    assert one is not None
    assert other is not None
    assert other.storage_offset() == one.numel()


def test_a_product_adds_to_it_and_sees_its_updates():
    flat, plain = maps()[:2], maps()[:2]
    a, b = ours(flat), torch.optim.AdamW(parameters(plain), lr=0.1, weight_decay=0.05)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    product = Product(flat)
    for step in range(3):
        for _ in range(2):  # micro-batches
            torch.autograd.backward([y.square().sum() for y in product(x)])
            torch.autograd.backward([one(x).square().sum() for one in plain])
        for p, q in zip(parameters(flat), parameters(plain), strict=True):
            assert float((p.grad - q.grad).norm()) <= 1e-4 * float(q.grad.norm()), step  # type: ignore[operator, union-attr]
        for optimizer in (a, b):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for one, other in zip(product(x), [one(x) for one in plain], strict=True):
        assert float((one - other).norm()) <= 1e-3 * float(other.norm())
