"""The router and weighted SwiGLU in Triton's interpreter against torch, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.moe_kit import GivenExperts, moe_config, twins
from support.tiers import fast
from torch import Tensor

pytest.importorskip("triton")

from qcore.api.blocks import Packed
from qcore.nn.moe import triton as experts_triton
from qcore.nn.moe.experts import Routing
from qcore.nn.moe.triton_routing import routing_of
from qcore.nn.recompute import run_layers
from qcore_qwen35 import moe
from qcore_qwen35.ops.moe import reference, triton
from qcore_qwen35.ops.verify import CASES, verify


def grads(function: object, given: list[Tensor], more: list[object]) -> list[Tensor]:
    given = [one.detach().clone().requires_grad_() for one in given]
    found = function(*given, *more)  # type: ignore[operator]
    outputs = found if isinstance(found, tuple) else (found,)
    generator = torch.Generator().manual_seed(5)
    total = sum(
        (one * torch.randn(one.shape, generator=generator)).sum()
        for one in outputs if one.is_floating_point()
    )  # fmt: skip
    assert isinstance(total, Tensor)
    total.backward()
    return [*(one.detach() for one in outputs), *(g.grad for g in given if g.grad is not None)]


def same(one: list[Tensor], two: list[Tensor]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    fast([(1, 7, 2), (19, 256, 8), (33, 5, 5), (9, 8, 1)], (19, 256, 8), names=3),
)
def test_the_router(tokens: int, experts: int, k: int) -> None:
    scores = torch.randn(tokens, experts + 3, generator=torch.Generator().manual_seed(0))[
        :, :experts
    ]
    same(grads(triton.router, [scores], [k]), grads(moe.router, [scores], [k]))


@pytest.mark.parametrize("part", [0, 2])
def test_the_router_when_one_result_is_used(part: int) -> None:
    scores = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    found = []
    for function in (triton.router, moe.router):
        x = scores.clone().requires_grad_()
        function(x, 3)[part].square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "k", "inner"), fast([(1, 2, 8), (13, 3, 40), (7, 2, 512)], (13, 3, 40), names=3)
)
def test_weighted_up(tokens: int, k: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(0)
    routing = Routing.of(torch.rand(tokens, 6, generator=generator).topk(k, 1).indices, 6)
    gate_up = torch.randn(tokens * k, 2 * inner, generator=generator)
    weights = torch.rand(tokens, k, generator=generator)
    one, two = (
        grads(function, [gate_up, weights], [routing])
        for function in (triton.weighted_up, reference.weighted_up)
    )
    same(one, two)


@pytest.mark.parametrize(("tokens", "inner"), fast([(1, 8), (13, 40), (7, 512)], (13, 40), names=2))
def test_shared_up_reads_slices(tokens: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(tokens, 2 * inner, generator=generator)
    score = torch.randn(tokens, 1, generator=generator)
    results = []
    for function in (triton.shared_up, reference.shared_up):
        whole, s = both.clone().requires_grad_(), score.clone().requires_grad_()
        y = function(*whole.chunk(2, -1), s)
        y.square().sum().backward()
        assert whole.grad is not None
        assert s.grad is not None
        results.append([y.detach(), whole.grad, s.grad])
    same(*results)


def test_derivatives_of_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    routing = Routing.of(torch.tensor([[2, 0], [0, 1], [1, 2]]), 3)
    gate_up = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda g, w: reference.weighted_up(g, w, routing), (gate_up, weights)
    )
    gate, up = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    score = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        reference.shared_up, tuple(one.requires_grad_() for one in (gate, up, score))
    )


@pytest.mark.parametrize("op", fast([op for op in CASES if op.startswith("moe_")], "moe_router"))
@pytest.mark.slow
def test_the_checks_pass_and_can_fail(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    verdict = verify(op, torch.device("cpu"))
    assert verdict.output < 1e-2  # the interpreter cuts where a card rounds
    name = {"moe_router": "router"}.get(op, op.removeprefix("moe_"))
    real = getattr(triton, name)

    def wrong(*given: object) -> object:
        found = real(*given)
        return (found[0].flip(1), *found[1:]) if isinstance(found, tuple) else found * 1.1

    monkeypatch.setattr(triton, name, wrong)
    assert not verify(op, torch.device("cpu")).good


class Fast(GivenExperts):
    """Every op of the mixture by Triton."""

    def kernel(self, op: str, reference: Any) -> Any:
        fast = {
            "expert_routing": routing_of, "qwen35::moe_router": triton.router,
            "qwen35::moe_weighted_up": triton.weighted_up,
            "qwen35::moe_shared_up": triton.shared_up,
        }  # fmt: skip
        return fast.get(op, reference)

    compute = staticmethod(experts_triton.grouped)


@pytest.mark.parametrize("policy", fast(["none", "elementwise", "full"], "elementwise"))
def test_the_block_and_its_gradients_as_in_torch(policy: str) -> None:
    """Whatever is computed again; the router's gradient comes by its weights and by the loss."""
    config = moe_config(num_experts=8, layers=["full_attention"])
    pair = twins(config)
    weights = pair.theirs.model.state_dict()
    x = torch.randn(11, 48, generator=torch.Generator().manual_seed(0))
    found = []
    for build in (Fast, GivenExperts):
        context = build(config, weights, torch.float32, core=True)
        block = moe.Moe(context, config, "layers.0.mlp").requires_grad_(False)
        block.gate.requires_grad_(True)
        block.shared_expert_gate.requires_grad_(True)
        packed = Packed.of([torch.zeros(11, dtype=torch.int64)])
        given = x.clone().requires_grad_()
        y = run_layers([Layer(block)], given, packed, [policy])
        (y.square().sum() + 10 * moe.balance_loss(packed.kept())).backward()
        grads = [given.grad, *(p.grad for p in block.parameters() if p.requires_grad)]
        found.append([y.detach(), *(one for one in grads if one is not None)])
    assert len(found[0]) == 4
    same(*found)


class Layer:
    """A block as a layer of its own."""

    def __init__(self, block: moe.Moe) -> None:
        self.block = block

    def __call__(self, x: Tensor, batch: Packed, cache: Any = None) -> Tensor:
        return self.block(x, batch)

    def new_cache(self, tokens: int, device: torch.device) -> None: ...
