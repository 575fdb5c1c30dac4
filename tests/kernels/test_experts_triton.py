"""Experts in Triton's interpreter against the loop over experts: outputs, gradients, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiers import fast
from torch import Tensor

pytest.importorskip("triton")

from qcore.nn.moe import experts
from qcore.nn.moe import triton as experts_triton
from qcore.nn.moe import triton_routing as experts_triton_routing
from qcore.nn.moe.experts import Experts, Routing, Tokens
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.recompute import recompute_cheap

E = 6


def made(lora: Lora | None, out: int, into: int, *, quantize: bool, dtype: torch.dtype) -> Experts:
    generator = torch.Generator().manual_seed(1)
    module = Experts((E, out, into), dtype, lora)
    value = torch.randn(E, out, into, generator=generator) / into**0.5
    module.hold(slice(0, E), value, quantize=quantize, dtype=dtype)
    if lora is not None:
        a, b = (torch.randn(shape, generator=generator) for shape in module.lora_shapes(lora.r))
        module.set_lora(a, 0.3 * b, trained=True)
    return module


def run(
    compute: object, module: Experts, x: Tensor, chosen: Tensor, tokens: Tokens, dy: Tensor
) -> list[Tensor]:
    routing = Routing.of(chosen, E)
    x = x.clone().requires_grad_()
    for parameter in module.parameters():
        parameter.grad = None
    y = compute(x, module, routing, tokens)  # type: ignore[operator]
    y.backward(dy)
    grads = [p.grad for p in (x, module.lora_A, module.lora_B) if p is not None]
    return [y.detach(), *(g for g in grads if g is not None)]


CHOSEN = {
    "odd rows": torch.rand(21, E, generator=torch.Generator().manual_seed(0)).topk(2).indices,
    "one token": torch.tensor([[1, 4]]),
    "one expert takes all": torch.full((19, 1), 3),
    "first and last": torch.tensor([[0, E - 1], [E - 1, 0], [0, E - 1]]),
}
LORAS = {"none": None, "r=3": Lora(r=3, lora_alpha=4), "r=20": Lora(r=20, lora_alpha=8)}


def compare(
    chosen: Tensor, tokens: Tokens, module: Experts, bound: float, *, strided: bool = False
) -> None:
    _, out, into = module.shape
    generator = torch.Generator().manual_seed(2)
    count, k = chosen.shape
    rows_in = count if tokens == "in" else count * k
    rows_out = count if tokens == "out" else count * k
    width = into + 8 if strided else into
    x = torch.randn(rows_in, width, generator=generator).to(module.run_dtype)[:, :into]
    dy = torch.randn(rows_out, out, generator=generator).to(module.run_dtype)
    found = run(experts_triton.grouped, module, x, chosen, tokens, dy)
    wanted = run(experts.grouped, module, x, chosen, tokens, dy)
    assert len(found) == len(wanted) == (2 if module.lora is None else 4)
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        assert float((one - two).float().norm() / two.float().norm()) <= bound


@pytest.mark.parametrize("tokens", [None, "in", "out"])
@pytest.mark.parametrize("case", fast(CHOSEN, "odd rows"))
@pytest.mark.parametrize("lora", fast(LORAS, "r=3"))
def test_the_map_and_its_gradients(case: str, lora: str, tokens: Tokens) -> None:
    module = made(LORAS[lora], 40, 50, quantize=False, dtype=torch.float32)
    module.run_dtype = torch.float32
    compare(CHOSEN[case], tokens, module, 1e-6, strided=True)


@pytest.mark.parametrize("size", fast([(40, 50), (64, 128), (48, 96)], (48, 96)), ids=str)
@pytest.mark.parametrize("few", [True, False], ids=["read in the product", "dequantized"])
def test_four_bit_weights(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], few: bool
) -> None:
    monkeypatch.setattr(experts_triton, "FEW", 10**6 if few else 0)
    module = made(LORAS["r=3"], *size, quantize=True, dtype=torch.float32)
    module.run_dtype = torch.float32
    compare(CHOSEN["odd rows"], "in", module, 1e-6)
    compare(CHOSEN["odd rows"], "out", module, 1e-6)


def test_weights_dequantized_a_few_experts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_triton, "FEW", 0)
    monkeypatch.setattr(experts_triton, "TOGETHER", 4 * 4 * 64 * 96)
    module = made(LORAS["r=3"], 64, 96, quantize=True, dtype=torch.float32)
    module.run_dtype = torch.float32
    compare(CHOSEN["odd rows"], "in", module, 1e-6)


def test_in_bfloat16() -> None:
    module = made(LORAS["r=3"], 64, 96, quantize=True, dtype=torch.bfloat16)
    module.run_dtype = torch.bfloat16
    compare(CHOSEN["odd rows"], "in", module, 2e-2)  # the interpreter cuts where a card rounds


def test_gradients_are_added_where_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made(LORAS["r=3"], 40, 50, quantize=False, dtype=torch.float32)
    routing = Routing.of(CHOSEN["odd rows"], E)
    x = torch.randn(21, 50)
    parameters = [p for p in (module.lora_A, module.lora_B) if p is not None]
    handed: list[bool] = []
    real = experts_triton._Products.outer

    def outer(self: Any, *given: Any, **more: Any) -> Tensor | None:
        found = real(self, *given, **more)
        handed.append(found is not None)
        return found

    monkeypatch.setattr(experts_triton._Products, "outer", outer)
    grads = []
    for module.accumulates in (False, True):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with recompute_cheap():
            y = experts_triton.grouped(x, module, routing, "in")
        y.square().sum().backward()
        grads.append([parameter.grad for parameter in parameters])
    assert handed == [True, True, False, False]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.slow
def test_the_check_passes_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(experts_triton, "tile_rows", lambda rows, experts: 16)
    verdict = experts_triton._compared(cpu, 9, "in")
    assert verdict.output < 3e-2  # the interpreter cuts where a card rounds
    assert verdict.gradient < 5e-2
    real = experts_triton._Products.turned_b
    monkeypatch.setattr(
        experts_triton._Products, "turned_b", lambda self, *given: real(self, *given).roll(1, 0)
    )
    assert not experts_triton._compared(cpu, 9, "in").good


def test_before_the_first_step_it_is_the_base_bit_for_bit() -> None:
    with_lora = made(LORAS["r=3"], 64, 96, quantize=True, dtype=torch.bfloat16)
    with_lora.reset_lora("experts", 7, torch.device("cpu"))
    base = made(None, 64, 96, quantize=True, dtype=torch.bfloat16)
    routing = Routing.of(CHOSEN["odd rows"], E)
    x = torch.randn(21, 96).bfloat16()
    one, two = (experts_triton.grouped(x, m, routing, "in") for m in (with_lora, base))
    assert torch.equal(one, two)


@pytest.mark.parametrize("case", CHOSEN)
def test_rows_are_sorted_as_by_a_stable_sort(case: str) -> None:
    found, wanted = experts_triton_routing.routing_of(CHOSEN[case], E), Routing.of(CHOSEN[case], E)
    for name in ("order", "inverse", "ends", "counts"):
        one, two = getattr(found, name), getattr(wanted, name)
        assert torch.equal(one, two)
        assert one.dtype == two.dtype
    assert found.tiles is not None
    assert torch.equal(found.tiles, experts_triton.tiles_of(wanted))


@pytest.mark.slow
def test_many_rows_and_experts_are_sorted() -> None:
    verdict = experts_triton_routing.verify(torch.device("cpu"))
    assert verdict.good


def test_every_tile_is_within_one_expert() -> None:
    routing = experts_triton_routing.routing_of(CHOSEN["odd rows"].repeat(9, 1), E)
    assert routing.tiles is not None
    height = experts_triton.tile_rows(len(routing.order), E)
    covered: list[int] = []
    for expert, first in routing.tiles.tolist():
        if expert >= 0:
            start, end = ([0, *routing.ends.tolist()])[expert], routing.ends.tolist()[expert]
            assert start <= first < end
            covered += range(first, min(first + height, end))
    assert sorted(covered) == list(range(len(routing.order)))


@pytest.mark.parametrize("tokens", fast([60, 150], 150))
def test_last_rows_take_half_a_tile(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Experts with fewer than 64 rows, and with 128 and a few more."""
    monkeypatch.setattr(experts_triton, "tile_rows", lambda rows, experts: 128)
    monkeypatch.setattr(experts_triton, "FEW", 0)
    module = made(LORAS["r=3"], 40, 50, quantize=False, dtype=torch.float32)
    module.run_dtype = torch.float32
    chosen = torch.stack([torch.arange(tokens) % 2, torch.full((tokens,), 4)], 1)
    compare(chosen, "in", module, 1e-6)
    compare(chosen, "out", module, 1e-6)
