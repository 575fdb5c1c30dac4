"""Recompute: every policy gives the same numbers, keeps what it says, and draws dropout again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.api.blocks import Packed
from qcore.nn.recompute import POLICIES, recomputable, recompute, recompute_cheap, run_layers


class _Block(nn.Module):
    def __init__(self, seed: int, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(16, 8)
        self.dropout = dropout
        self.runs = 0

    def forward(self, x: Tensor, batch: Packed, cache: Any | None = None) -> Tensor:
        self.runs += 1
        y = recompute(F.layer_norm, x, (8,))
        left, right = self.up(y).chunk(2, -1)
        z = recompute(lambda a, b: F.silu(a) * b, left, right)
        batch.keep(f"aux {id(self)}", (z.mean(), 3))
        return x + F.dropout(self.down(z), self.dropout, self.training)

    def new_cache(self, tokens: int, device: torch.device) -> None:
        return None


def _run(policy: str, dropout: float = 0.0) -> tuple[Tensor, list[Tensor], list[_Block]]:
    blocks = [_Block(seed, dropout) for seed in range(3)]
    batch = Packed.of([torch.arange(5)])
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    y = run_layers(blocks, x, batch, [policy] * 3, dropout=dropout > 0)
    aux = sum(value for value, _ in batch.kept().values())
    (y.square().sum() + 7 * aux).backward()
    grads = [p.grad for block in blocks for p in block.parameters()]
    assert all(gradient is not None for gradient in grads)
    return y.detach(), grads, blocks  # type: ignore[return-value]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", POLICIES[1:])
def test_policies_are_equal_bit_for_bit(policy: str, dropout: float) -> None:
    y, grads, _ = _run("none", dropout)
    found, others, blocks = _run(policy, dropout)
    assert torch.equal(found, y)
    assert all(map(torch.equal, others, grads))
    assert {block.runs for block in blocks} == {2 if policy in ("full", "offload") else 1}


def test_a_cheap_result_is_not_kept() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)
    made: list[int] = []

    def cheap(tensor: Tensor) -> Tensor:
        made.append(1)
        return tensor.exp()

    with recompute_cheap():
        y = recompute(cheap, x) @ weight
    assert len(made) == 1
    y.sum().backward()
    assert len(made) == 2
    assert torch.equal(weight.grad, x.exp().t() @ torch.ones(4, 8))  # type: ignore[arg-type]


def test_a_view_of_a_cheap_result_and_chains_are_made_again() -> None:
    weight = torch.randn(4, 8, requires_grad=True, dtype=torch.float64)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)

    def run() -> Tensor:
        wide = recompute(torch.exp, recompute(torch.sin, x))
        return F.linear(wide[1:5, 4:].t(), weight[:, :4].t()[:4, :4]).square().sum()

    expected = torch.autograd.grad(run(), (x, weight))
    with recompute_cheap():
        loss = run()
    found = torch.autograd.grad(loss, (x, weight))
    assert all(map(torch.equal, found, expected))


def test_a_fused_result_is_remembered_by_what_it_equals() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(8, 8, requires_grad=True)
    with recompute_cheap():
        both = x + 1
        unit = recomputable(F.layer_norm(both, (8,)), F.layer_norm, both, (8,))
        loss = (unit @ weight).sum()
    found = torch.autograd.grad(loss, (x, weight))
    expected = torch.autograd.grad((F.layer_norm(x + 1, (8,)) @ weight).sum(), (x, weight))
    assert all(map(torch.equal, found, expected))
