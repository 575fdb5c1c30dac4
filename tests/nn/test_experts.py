"""Experts against a loop over tokens in float64, routing against index_add, cost and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import qcore.nn.moe.experts
from qcore.nn.moe.experts import Experts, Routing
from qcore.nn.qlora.lora_layer import Lora

CPU = torch.device("cpu")
E, OUT, IN = 6, 16, 24


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def choices(tokens: int, k: int, experts: int = E, *, seed: int = 0) -> Tensor:
    """k different experts a token, as top-k picks them."""
    return draw(tokens, experts, seed=seed).topk(k).indices


ONE_TAKES_ALL = torch.full((7, 1), 3)
#: name -> the experts of each token
CHOSEN: dict[str, Tensor] = {
    "one each": choices(9, 1),
    "two each": choices(7, 2),
    "three each, odd rows": choices(5, 3),
    "four each": choices(8, 4, seed=2),
    "one token": choices(1, 2),
    "one expert takes all": ONE_TAKES_ALL,
    "the first and the last": torch.tensor([[0, E - 1], [E - 1, 0], [0, E - 1]]),
    "some have no row": torch.tensor([[1, 4], [4, 1], [1, 4], [4, 2], [2, 4]]),
}


def made(
    lora: Lora | None, *, dtype: torch.dtype = torch.float64, quantize: bool = False,
    experts: int = E, out: int = OUT, into: int = IN,
) -> Experts:  # fmt: skip
    """Experts with random values everywhere; the adapter in the dtype of a float64 module."""
    module = Experts((experts, out, into), dtype, lora)
    value = draw(experts, out, into, seed=1) / into**0.5
    module.hold(slice(0, experts), value.float(), quantize=quantize, dtype=dtype)
    if lora is not None:
        a, b = module.lora_shapes(lora.r)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        left, right = draw(*a, seed=2).to(kind), draw(*b, seed=3).to(kind)
        module.set_lora(left, 0.3 * right, trained=True)
    return module


def weights_of(module: Experts) -> Tensor:
    return module.dense_slices(slice(0, module.shape[0]))


@dataclass
class Result:
    y: Tensor
    x: Tensor
    a: Tensor | None = None
    b: Tensor | None = None


def ours(module: Experts, x: Tensor, chosen: Tensor, dy: Tensor) -> Result:
    """Outputs of each (token, choice), ``[T, k, out]``, and the gradients."""
    routing = Routing.of(chosen, module.shape[0])
    x = x.clone().requires_grad_()
    for parameter in (module.lora_A, module.lora_B):
        if parameter is not None:
            parameter.grad = None
    rows = module(routing.gather(x), routing)
    rows.backward(dy.flatten(0, 1)[routing.order])
    assert x.grad is not None
    y = rows.detach()[routing.inverse].view(dy.shape)
    if module.lora_A is None or module.lora_B is None:
        return Result(y, x.grad)
    return Result(y, x.grad, module.lora_A.grad, module.lora_B.grad)


def by_hand(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, x: Tensor, chosen: Tensor, dy: Tensor
) -> Result:
    """Token by token, choice by choice, in float64; PEFT's layout is read column by column."""
    r, experts = b.shape[1] // len(weight), len(weight)
    x, a, b = (t.detach().double().clone().requires_grad_() for t in (x, a, b))
    rows = []
    for row, picked in zip(x, chosen.tolist(), strict=True):
        for e in picked:
            y = weight[e].double() @ row
            for k in range(r):
                y = y + scaling * b[:, k * experts + e] * (a[e * r + k] @ row)
            rows.append(y)
    y = torch.stack(rows).view(dy.shape)
    y.backward(dy.double())
    assert x.grad is not None
    return Result(y.detach(), x.grad, a.grad, b.grad)


def close(found: Tensor | None, expected: Tensor | None, bound: float) -> None:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0
    assert float((found.double() - expected).abs().max()) <= bound * scale


def compare(module: Experts, chosen: Tensor, bound: float, dtype: torch.dtype) -> None:
    x = draw(len(chosen), IN, seed=4).to(dtype)
    dy = draw(*chosen.shape, OUT, seed=5).to(dtype)
    found = ours(module, x, chosen, dy)
    assert module.lora is not None
    assert module.lora_A is not None
    assert module.lora_B is not None
    expected = by_hand(
        weights_of(module), module.lora_A, module.lora_B, module.lora.scaling, x, chosen, dy
    )
    for name in ("y", "x", "a", "b"):
        close(getattr(found, name), getattr(expected, name), bound)


LORAS = {
    "rank 1": Lora(r=1, lora_alpha=3),
    "rank 3": Lora(r=3, lora_alpha=4),
    "rank 8, rank-stabilised": Lora(r=8, lora_alpha=16, use_rslora=True),
}


# -- against the loop


@pytest.mark.parametrize("case", CHOSEN)
@pytest.mark.parametrize("lora", LORAS)
def test_outputs_and_gradients_equal_a_loop_over_tokens(case: str, lora: str):
    compare(made(LORAS[lora]), CHOSEN[case], 1e-13, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_the_dtype_of_a_run(dtype: torch.dtype):
    bound = 3e-2 if dtype == torch.bfloat16 else 1e-5
    module = made(LORAS["rank 3"], dtype=dtype)
    compare(module, CHOSEN["three each, odd rows"], bound, dtype)
    for parameter in (module.lora_A, module.lora_B):
        assert parameter is not None
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@pytest.mark.parametrize("together", [1, 2, 4, E])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CHOSEN)
@pytest.mark.parametrize("lora", LORAS)
def test_the_grouped_product_is_the_same(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, case: str, lora: str, together: int
):
    """What a GPU runs; torch has it on the CPU too. Ranks are filled up to eight there."""
    monkeypatch.setattr(qcore.nn.moe.experts, "_is_fused", lambda x, module: True)
    monkeypatch.setattr(qcore.nn.moe.experts, "TOGETHER", together * 2 * OUT * IN)
    bound = 3e-2 if dtype == torch.bfloat16 else 1e-5
    compare(made(LORAS[lora], dtype=dtype), CHOSEN[case], bound, dtype)


@pytest.mark.parametrize("case", CHOSEN)
@pytest.mark.parametrize("fused", [False, True], ids=["loop", "grouped product"])
def test_tokens_in_and_out_are_a_gather_before_and_a_sum_after(
    monkeypatch: pytest.MonkeyPatch, case: str, fused: bool
):
    dtype = torch.float32 if fused else torch.float64
    monkeypatch.setattr(qcore.nn.moe.experts, "_is_fused", lambda x, module: fused)
    module, chosen = made(LORAS["rank 3"], dtype=dtype), CHOSEN[case]
    tokens, k = chosen.shape
    routing = Routing.of(chosen, E)
    token = torch.arange(tokens).repeat_interleave(k)[routing.order]
    x = draw(tokens, IN, seed=4).to(dtype)
    for given, plain, sums in ((x, x[token], False), (x[token], x[token], True)):
        results = []
        for direct in (True, False):
            module.zero_grad()
            start = (given if direct else plain).clone().requires_grad_()
            if direct:
                y = module(start, routing, tokens="out" if sums else "in")
            else:
                y = module(start, routing)
                y = y.new_zeros(tokens, OUT).index_add(0, token, y) if sums else y
            y.backward(draw(*y.shape, seed=5).to(dtype))
            dx = start.grad
            assert dx is not None
            if not direct and not sums:
                dx = torch.zeros_like(x).index_add(0, token, dx)
            results.append((y.detach(), dx, module.lora_A.grad, module.lora_B.grad))  # type: ignore[union-attr]
        for one, two in zip(*results, strict=True):
            close(one, two.double(), 1e-13 if dtype == torch.float64 else 1e-5)


def test_rows_that_tokens_give_are_not_saved():
    module = made(LORAS["rank 3"], dtype=torch.float32)
    routing = Routing.of(CHOSEN["two each"], E)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(draw(7, IN, seed=1).float().requires_grad_(), routing, tokens="in")
    assert (7, IN) in saved
    assert (14, IN) not in saved


def test_resident_weights_are_the_same_bits_and_still_four_bit():
    module = made(LORAS["rank 3"], dtype=torch.bfloat16, quantize=True)
    dense, held = module.dense_slices(slice(0, E)), module.stored_bytes
    module.resident = True
    assert torch.equal(module.dense_slices(slice(0, E)), dense)
    assert torch.equal(module.dense_slices(slice(2, 4)), dense[2:4])
    assert (
        module.dense_slices(slice(0, E)).data_ptr() == module.dense_slices(slice(0, E)).data_ptr()
    )
    assert module.four_bit
    assert module.stored_bytes == held
    module.resident = False
    assert module.dense_slices(slice(0, E)).data_ptr() != dense.data_ptr()
    assert module._dense is None


def test_without_an_adapter():
    module, chosen = made(None), CHOSEN["some have no row"]
    x, dy = draw(len(chosen), IN, seed=4), draw(*chosen.shape, OUT, seed=5)
    found = ours(module, x, chosen, dy)
    nothing = torch.zeros(E, IN), torch.zeros(OUT, E)
    expected = by_hand(weights_of(module), *nothing, 1.0, x, chosen, dy)
    close(found.y, expected.y, 1e-13)
    close(found.x, expected.x, 1e-13)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_an_expert_without_rows_gets_no_gradient():
    chosen, r = CHOSEN["some have no row"], 3
    module = made(LORAS["rank 3"])
    found = ours(module, draw(5, IN, seed=4), chosen, draw(5, 2, OUT, seed=5))
    assert found.a is not None
    assert found.b is not None
    idle = {0, 3, 5}
    for e in range(E):
        assert bool(found.a[e * r : (e + 1) * r].any()) == (e not in idle)
        assert bool(found.b[:, e::E].any()) == (e not in idle)


def test_gradients_are_the_derivatives():
    module = made(Lora(r=2, lora_alpha=3), experts=3, out=4, into=5)
    routing = Routing.of(torch.tensor([[2, 0], [0, 2]]), 3)
    x = draw(4, 5, seed=4).requires_grad_()

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"lora_A": a, "lora_B": b}, (x, routing))

    assert torch.autograd.gradcheck(function, (x, module.lora_A, module.lora_B))


def test_before_the_first_step_it_is_the_base_bit_for_bit():
    for quantize in (False, True):
        with_lora = made(Lora(r=3, lora_alpha=6), dtype=torch.bfloat16, quantize=quantize)
        with_lora.reset_lora("experts", 7, CPU)
        base = made(None, dtype=torch.bfloat16, quantize=quantize)
        routing = Routing.of(CHOSEN["two each"], E)
        rows = routing.gather(draw(7, IN, seed=4).bfloat16())
        assert torch.equal(with_lora(rows, routing), base(rows, routing))


def test_initial_values_are_those_of_pefts_wrapper():
    """PEFT draws A ``[E r, in]`` as one matrix: uniform within ``1 / sqrt(in)``; B is zero."""
    module = Experts((8, 4, 4096), torch.float32, Lora(r=8, lora_alpha=8))
    module.reset_lora("a", 0, CPU)
    assert module.lora_A is not None
    assert module.lora_B is not None
    assert (module.lora_A.shape, module.lora_B.shape) == ((64, 4096), (4, 64))
    reference = torch.empty(64, 4096)
    nn.init.kaiming_uniform_(reference, a=5**0.5)
    assert float(module.lora_A.detach().abs().max()) <= 1 / 64
    assert float(module.lora_A.detach().std()) == pytest.approx(float(reference.std()), rel=0.01)
    assert not module.lora_B.any()
    assert module.lora_A.requires_grad
    assert module.lora_B.requires_grad


def test_twice_the_same_bits():
    module, chosen = made(LORAS["rank 3"], dtype=torch.float32), choices(33, 4)
    x, dy = draw(33, IN, seed=4).float(), draw(33, 4, OUT, seed=5).float()
    one, two = (ours(module, x, chosen, dy) for _ in range(2))
    for name in ("y", "x", "a", "b"):
        assert torch.equal(getattr(one, name), getattr(two, name))


def test_a_token_does_not_depend_on_its_neighbours():
    """Each row alone gives the bits it has among others of the same experts' counts."""
    module, chosen = made(LORAS["rank 3"]), choices(11, 2)
    x = draw(11, IN, seed=4)
    routing = Routing.of(chosen, E)
    weights = draw(11, 2, seed=6).softmax(-1)
    whole = routing.combine(module(routing.gather(x), routing), weights)
    for t in range(11):
        alone = Routing.of(chosen[t : t + 1], E)
        rows = module(alone.gather(x[t : t + 1]), alone)
        close(alone.combine(rows, weights[t : t + 1])[0].detach(), whole[t].detach(), 1e-14)


# -- routing


@pytest.mark.parametrize("case", CHOSEN)
def test_rows_are_sorted_by_expert_and_stable(case: str):
    chosen = CHOSEN[case]
    routing = Routing.of(chosen, E)
    flat = chosen.flatten()
    assert torch.equal(routing.counts, torch.bincount(flat, minlength=E))
    by_expert = [place for e in range(E) for place in (flat == e).nonzero().flatten().tolist()]
    assert routing.order.tolist() == by_expert
    assert torch.equal(routing.order[routing.inverse], torch.arange(len(flat)))
    assert [(e, b - a) for e, a, b in routing.spans] == [
        (e, n) for e, n in enumerate(routing.counts.tolist()) if n
    ]
    assert (routing.ends.dtype, routing.k) == (torch.int32, chosen.shape[1])


@pytest.mark.parametrize("case", CHOSEN)
def test_gather_and_combine_are_index_select_and_index_add(case: str):
    chosen = CHOSEN[case]
    tokens, k = chosen.shape
    routing = Routing.of(chosen, E)
    token = torch.arange(tokens).repeat_interleave(k)[routing.order]
    x, dy = draw(tokens, IN, seed=1).requires_grad_(), draw(tokens * k, IN, seed=2)
    found = routing.gather(x)
    assert torch.equal(found, x.index_select(0, token))
    found.backward(dy)
    close(x.grad, torch.zeros(tokens, IN).double().index_add(0, token, dy), 1e-14)

    rows = draw(tokens * k, IN, seed=3)
    weights = draw(tokens, k, seed=4).softmax(-1)
    weight_of = weights.flatten()[routing.order][:, None]
    expected = torch.zeros(tokens, IN).double().index_add(0, token, rows * weight_of)
    close(routing.combine(rows, weights), expected, 1e-14)


@pytest.mark.parametrize("case", ["two each", "three each, odd rows", "one expert takes all"])
def test_derivatives_of_gather_and_combine(case: str):
    chosen = CHOSEN[case][:4]
    routing = Routing.of(chosen, E)
    x = draw(len(chosen), 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(routing.gather, (x,))
    rows = draw(chosen.numel(), 3, seed=2).requires_grad_()
    weights = draw(*chosen.shape, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(routing.combine, (rows, weights))


def test_combine_rounds_once():
    """The sum of a token's rows in bf16 is that of float32, rounded; not a sum of roundings."""
    routing = Routing.of(choices(64, 4), E)
    rows = draw(256, 8, seed=1).bfloat16()
    weights = draw(64, 4, seed=2).softmax(-1).bfloat16()
    flat = rows[routing.inverse].view(64, 4, 8)
    exact = (flat.float() * weights.float()[:, :, None]).sum(1)
    found = routing.combine(rows, weights)
    assert found.dtype == torch.bfloat16
    # Half a unit in the last place, of eight bits.
    assert float(((found.float() - exact).abs() / exact.abs()).max()) <= 2**-8


# -- cost and memory


def counted(run: Callable[[], object]) -> int:
    """Products and sums of all matrix products; torch itself does not count those in place."""

    def in_place(total: object, left: tuple[int, int], right: tuple[int, int], **_: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    more = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("experts", [4, 64])
@pytest.mark.parametrize("tokens", [5, 10, 40])
def test_cost_is_linear_in_rows_whatever_the_experts(experts: int, tokens: int):
    k, r = 2, 3
    module = made(Lora(r=r, lora_alpha=3), experts=experts)
    routing = Routing.of(choices(tokens, k, experts), experts)
    x = routing.gather(draw(tokens, IN, seed=1)).requires_grad_()
    rows = tokens * k
    out: list[Tensor] = []
    forward = counted(lambda: out.append(module(x, routing)))
    assert forward == 2 * rows * (OUT * IN + r * IN + r * OUT)
    backward = counted(lambda: out[0].sum().backward())
    assert backward == 2 * rows * (OUT * IN + 2 * r * IN + 2 * r * OUT)
    moved = counted(lambda: routing.combine(out[0].detach(), torch.ones(tokens, k).double()))
    assert moved <= 2 * rows * OUT


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
def test_what_is_saved_for_backward_is_rows_and_little_else(quantize: bool):
    module = made(LORAS["rank 3"], dtype=torch.float32, quantize=quantize)
    routing = Routing.of(CHOSEN["two each"], E)
    x = routing.gather(draw(7, IN, seed=1).float()).requires_grad_()
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, routing)
    # Beside whole numbers: where the rows went.
    where = [(14,), (14,), (E,)]
    for shape in where:
        saved.remove(shape)
    assert sorted(saved) == sorted([(14, IN), (14, 3), (3 * E, IN), (OUT, 3 * E)])
    saved.clear()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        routing.gather(x.detach()[:7].requires_grad_())
    assert sorted(saved) == sorted(where)


def test_recompute_gives_the_same_gradients():
    routing = Routing.of(CHOSEN["two each"], E)
    results = []
    for again in (False, True):
        module = made(LORAS["rank 3"], dtype=torch.float32)
        x = draw(14, IN, seed=1).float().requires_grad_()
        y = checkpoint(module, x, routing, use_reentrant=False) if again else module(x, routing)
        y.backward(draw(14, OUT, seed=2).float())
        assert module.lora_A is not None
        assert module.lora_B is not None
        results.append((y, x.grad, module.lora_A.grad, module.lora_B.grad))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# -- holding


@pytest.mark.parametrize("quantize", [False, True], ids=["bf16", "nf4"])
@pytest.mark.parametrize("step", [1, 2, 4, E])
def test_held_in_slabs_is_held_weights_of(step: int, quantize: bool):
    value = draw(E, OUT, IN, seed=8).bfloat16()
    whole = Experts((E, OUT, IN), torch.bfloat16, None)
    whole.hold(slice(0, E), value, quantize=quantize, dtype=torch.bfloat16)
    parts = Experts((E, OUT, IN), torch.bfloat16, None)
    for at in range(0, E, step):
        rows = slice(at, min(at + step, E))
        parts.hold(rows, value[rows], quantize=quantize, dtype=torch.bfloat16)
    assert torch.equal(weights_of(parts), weights_of(whole))
    assert parts.four_bit == whole.four_bit == quantize
    assert parts.stored_bytes == whole.stored_bytes
    assert (parts.weight is None) == quantize
    if not quantize:
        assert torch.equal(weights_of(whole), value)
        assert whole.stored_bytes == 2 * value.numel()
    for e in range(E):
        assert torch.equal(parts.dense_slice(e), weights_of(whole)[e])


def test_a_reader_is_asked_for_experts_that_have_rows():
    reference, module = made(LORAS["rank 3"]), made(LORAS["rank 3"])
    held, asked = weights_of(reference), []

    def reader(expert: int) -> Tensor:
        asked.append(expert)
        return held[expert]

    module.weight = None
    module.read_from(reader)
    chosen = CHOSEN["some have no row"]
    x, dy = draw(5, IN, seed=4), draw(5, 2, OUT, seed=5)
    found, expected = ours(module, x, chosen, dy), ours(reference, x, chosen, dy)
    assert asked == [1, 2, 4, 1, 2, 4]  # once forward, once backward
    for name in ("y", "x", "a", "b"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


# -- 4 bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_nf4_it_is_over_what_nf4_holds(dtype: torch.dtype):
    """Outputs and gradients have the bits of the dequantized base."""
    four = made(LORAS["rank 3"], dtype=dtype, quantize=True)
    plain = made(LORAS["rank 3"], dtype=dtype)
    assert not torch.equal(weights_of(four), weights_of(plain))
    plain.hold(slice(0, E), weights_of(four), quantize=False, dtype=dtype)
    chosen = CHOSEN["some have no row"]
    x, dy = draw(5, IN, seed=4).to(dtype), draw(5, 2, OUT, seed=5).to(dtype)
    found, expected = ours(four, x, chosen, dy), ours(plain, x, chosen, dy)
    for name in ("y", "x", "a", "b"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
