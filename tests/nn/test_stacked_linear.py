"""Maps computed as one against the same maps one by one, in torch's own terms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qcore.nn.qlora.fused import Product
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.qlora.nf4 import NF4
from qcore.nn.qlora.stacked_linear import Stacked

CPU = torch.device("cpu")
T, K = 7, 64
F32, BF16 = torch.float32, torch.bfloat16

R4, R3, R8 = Lora(r=4, lora_alpha=8), Lora(r=3, lora_alpha=5), Lora(r=8, lora_alpha=8)
#: (out, LoRA, 4-bit) of each member.
STACKS = {
    "wide": [(96, R4, True), (64, R3, True)],
    "wide with small 16-bit maps": [(96, R4, True), (64, R8, True), (5, None, False)],
    "narrow": [(8, R3, True), (16, R4, True)],
    "one, wide": [(128, R4, True)],
    "one, narrow": [(32, R3, True)],
    "16-bit, wide": [(96, R4, False), (33, R4, False)],
    "16-bit, narrow": [(16, R4, False), (7, None, False)],
    "frozen": [(96, None, True), (5, None, False)],
}


def member(out: int, lora: Lora | None, four_bit: bool, dtype: torch.dtype, seed: int) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(out, K, generator=generator) / math.sqrt(K)
    module = Linear((out, K), dtype, lora)
    module.hold(slice(0, out), value.bfloat16(), quantize=four_bit, dtype=dtype)
    if lora is not None:
        module.reset_lora(str(seed), 3, CPU)
        nn.init.normal_(module.lora_B, generator=generator)  # type: ignore[arg-type]
    return module


def members(case: str, dtype: torch.dtype = F32) -> list[Linear]:
    return [member(*one, dtype, seed) for seed, one in enumerate(STACKS[case])]


def inputs(maps: Sequence[Linear], *lead: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(11)
    lead = lead or (T,)
    x = torch.randn(*lead, K, generator=generator)
    return x, [torch.randn(*lead, one.shape[0], generator=generator) for one in maps]


def expected(maps: Sequence[Linear], x: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, gradient of x, gradients of each A and B, by autograd over plain float32."""
    x = x.detach().float().clone().requires_grad_()
    leaves, outputs = [], []
    for one in maps:
        y = x @ one.dense().float().T
        if one.lora is not None:
            a, b = (m.detach().clone().requires_grad_() for m in (one.lora_A, one.lora_B))  # type: ignore[union-attr]
            y = y + (x @ a.T) @ b.T * one.lora.scaling
            leaves += [a, b]
        outputs.append(y)
    torch.autograd.backward(outputs, [grad.float() for grad in grads])
    return [*(y.detach() for y in outputs), x.grad, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def found(
    product: Product, maps: Sequence[Linear], x: Tensor, grads: Sequence[Tensor]
) -> list[Tensor]:
    x = x.clone().requires_grad_()
    outputs = product(x)
    torch.autograd.backward(outputs, list(grads))
    leaves = [m.grad for one in maps if one.lora for m in (one.lora_A, one.lora_B)]  # type: ignore[union-attr]
    return [*(y.detach() for y in outputs), x.grad, *leaves]  # type: ignore[list-item]


def forget(maps: Sequence[Linear]) -> None:
    for one in maps:
        for parameter in one.parameters():
            parameter.grad = None


def close(one: Sequence[Tensor], other: Sequence[Tensor], bound: float = 1e-5) -> None:
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).norm()) <= bound * float(theirs.norm())
        assert theirs.any()


@pytest.mark.parametrize("lead", [(T,), (1,), (3, 5)], ids=str)
@pytest.mark.parametrize("case", STACKS)
def test_it_is_the_maps_and_their_gradients(case: str, lead: tuple[int, ...]):
    maps = members(case)
    x, grads = inputs(maps, *lead)
    close(found(Product(maps), maps, x, grads), expected(maps, x, grads))


@pytest.mark.parametrize("case", STACKS)
def test_bf16_is_close_to_fp32(case: str):
    maps = members(case, BF16)
    x, grads = inputs(maps)
    x, grads = x.bfloat16(), [grad.bfloat16() for grad in grads]
    results = found(Product(maps), maps, x, grads)
    close([one.float() for one in results], expected(maps, x, grads), 1e-2)
    assert {one.dtype for one in results[: len(maps) + 1]} == {BF16}
    assert {one.dtype for one in results[len(maps) + 1 :]} <= {F32}


@pytest.mark.parametrize("case", STACKS)
def test_rows_that_lie_apart_and_gradients_in_one_buffer(case: str):
    maps = members(case)
    x, grads = inputs(maps)
    room = torch.full((T, K + 3), math.nan)
    room[:, :K] = x
    together = torch.cat(grads, 1)
    slices = torch.split(together, [one.shape[0] for one in maps], 1)
    close(found(Product(maps), maps, room[:, :K], slices), expected(maps, x, grads))
    assert torch.equal(together, torch.cat(grads, 1))


def test_outputs_are_slices_of_one_buffer():
    maps = members("wide")
    one, other = Product(maps)(inputs(maps)[0])
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def test_an_output_that_is_not_used_has_no_gradient():
    maps = members("wide")
    x, grads = inputs(maps)
    x.requires_grad_()
    Product(maps)(x)[1].backward(grads[1])
    assert not maps[0].lora_B.grad.any()  # type: ignore[union-attr]
    close([x.grad], [expected([maps[1]], x.detach(), grads[1:])[1]])  # type: ignore[list-item]


@pytest.mark.parametrize("case", ["wide", "narrow", "16-bit, wide", "16-bit, narrow"])
def test_new_masters_are_seen(case: str):
    maps = members(case)
    product = Product(maps)
    x, grads = inputs(maps)
    before = found(product, maps, x, grads)
    with torch.no_grad():
        for one in maps:
            if one.lora is not None:
                one.lora_A.mul_(2)  # type: ignore[union-attr]
                one.lora_B.grad = one.lora_A.grad = None  # type: ignore[union-attr]
    after = found(product, maps, x, grads)
    assert not torch.equal(before[0], after[0])
    close(after, expected(maps, x, grads))
    for one in maps:
        if one.lora is not None:
            one.set_lora(one.lora_A.detach() * 3, one.lora_B.detach() + 1, trained=True)  # type: ignore[operator, arg-type]
    close(found(product, maps, x, grads), expected(maps, x, grads))


def test_an_optimizer_of_torch_is_seen():
    for fused in (False, True):
        maps = members("wide")
        x, grads = inputs(maps)
        product = Product(maps)
        found(product, maps, x, grads)
        masters = [m for one in maps for m in (one.lora_A, one.lora_B)]
        torch.optim.AdamW(masters, lr=0.1, fused=fused).step()  # type: ignore[arg-type]
        forget(maps)
        close(found(product, maps, x, grads), expected(maps, x, grads))


@pytest.mark.parametrize("case", ["wide", "narrow", "16-bit, wide"])
def test_without_the_adapter_it_is_the_base(case: str):
    maps = members(case)
    product = Product(maps)
    x, grads = inputs(maps)
    product(x)
    lora = [one.lora for one in maps]
    for one in maps:
        one.lora = None
    close(product(x), [x @ one.dense().T for one in maps])
    for one, numbers in zip(maps, lora, strict=True):
        one.lora = numbers
    close(found(product, maps, x, grads), expected(maps, x, grads))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", STACKS)
def test_before_the_first_step_it_is_the_base_bit_for_bit(case: str, dtype: torch.dtype):
    maps = members(case, dtype)
    for one in maps:
        if one.lora_B is not None:
            nn.init.zeros_(one.lora_B)
    x = inputs(maps)[0].to(dtype)
    with_lora = [y.clone() for y in Product(maps)(x)]
    for one in maps:
        one.lora = None
    for one, other in zip(with_lora, Product(maps)(x), strict=True):
        # Products of other widths may sum in another order on CPUs; nothing else may differ.
        assert float((one - other).abs().max()) <= (1e-6 if dtype == F32 else 1e-2)


@pytest.mark.parametrize("case", ["16-bit, wide", "16-bit, narrow"])
def test_16_bit_weights_are_held_once(case: str):
    maps = members(case)
    dense = [one.dense().clone() for one in maps]
    product = Product(maps)
    x, grads = inputs(maps)
    product(x)
    assert len({one.dense().untyped_storage().data_ptr() for one in maps}) == 1
    for one, value in zip(maps, dense, strict=True):
        assert torch.equal(one.dense(), value)
    # Replaced weights are read.
    maps[0].hold(slice(0, maps[0].shape[0]), dense[0] * 2, quantize=False, dtype=F32)
    close(found(product, maps, x, grads), expected(maps, x, grads))


@pytest.mark.parametrize("case", ["wide", "narrow", "wide with small 16-bit maps"])
def test_resident_is_read_once(case: str, monkeypatch: pytest.MonkeyPatch):
    maps = members(case)
    reads: list[NF4] = []
    real = NF4.into
    monkeypatch.setattr(NF4, "into", lambda self, out: (reads.append(self), real(self, out))[1])
    x, grads = inputs(maps)
    read = []
    for resident in (False, True):
        for one in maps:
            one.resident = resident
        forget(maps)
        product = Product(maps)
        reads.clear()
        results = found(product, maps, x, grads)
        read.append((len(reads), results))
        forget(maps)
        found(product, maps, x, grads)
    count = sum(one.four_bit for one in maps)
    assert read[0][0] == 2 * count
    assert read[1][0] == count
    assert len(reads) == count
    for one, other in zip(read[0][1], read[1][1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("adjacent", [False, True])
def test_gradients_are_added_where_they_are(adjacent: bool):
    maps = members("wide")
    x, grads = inputs(maps)
    wanted = expected(maps, x, grads)
    flat = torch.ones(sum(one.lora_A.numel() for one in maps) + 8)  # type: ignore[union-attr]
    start = 0
    for one in maps:
        one.accumulates = True
        size = one.lora_A.numel()  # type: ignore[union-attr]
        one.lora_A.grad = flat[start : start + size].view_as(one.lora_A)  # type: ignore[union-attr, arg-type]
        one.lora_B.grad = torch.ones_like(one.lora_B)  # type: ignore[union-attr, arg-type]
        start += size + (0 if adjacent else 8)
    held = [m.grad for one in maps for m in (one.lora_A, one.lora_B)]  # type: ignore[union-attr]
    results = found(Product(maps), maps, x, grads)
    assert all(one is other for one, other in zip(results[3:], held, strict=True))
    close([*results[:3], *(one - 1 for one in results[3:])], wanted)


def test_what_is_saved_is_x_and_its_ranks():
    maps = members("wide")
    saved: list[Tensor] = []
    x = inputs(maps)[0].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        Product(maps)(x)
    assert sorted(tuple(one.shape) for one in saved) == [(T, 8), (T, K)]
    assert x.data_ptr() in [one.data_ptr() for one in saved]


def test_a_stack_is_its_members_on_a_cpu_and_registers_nothing():
    maps = members("wide with small 16-bit maps")
    block = nn.Module()
    for number, one in enumerate(maps):
        block.add_module(f"m{number}", one)
    before = dict(block.named_parameters())
    block.stack = Stacked(tuple(maps))  # type: ignore[assignment]
    assert dict(block.named_parameters()).keys() == before.keys()
    x, _ = inputs(maps)
    for one, other in zip(block.stack(x), [one(x) for one in maps], strict=True):  # type: ignore[operator]
        assert torch.equal(one, other)


def test_dropout_is_drawn_for_each_member():
    lora = Lora(r=4, lora_alpha=8, lora_dropout=0.5)
    maps = [member(96, lora, False, F32, seed) for seed in range(2)]
    x, _ = inputs(maps)
    torch.manual_seed(1)
    mine = Stacked(tuple(maps))(x)
    torch.manual_seed(1)
    for one, other in zip(mine, [one(x) for one in maps], strict=True):
        assert torch.equal(one, other)
    assert not Product(maps).takes(x)


def test_one_width():
    with pytest.raises(ValueError, match="one width"):
        Product([Linear((8, 64), F32, None), Linear((8, 32), F32, None)])


@pytest.mark.parametrize("case", ["wide", "narrow", "16-bit, wide"])
def test_no_rows(case: str):
    maps = members(case)
    x = torch.empty(0, K, requires_grad=True)
    y = Product(maps)(x)
    assert [one.shape for one in y] == [(0, one.shape[0]) for one in maps]
    torch.autograd.backward(y, [torch.empty_like(one) for one in y])
    assert x.grad is not None
    assert x.grad.shape == (0, K)


@pytest.mark.parametrize("case", STACKS)
def test_what_inference_mode_left_can_be_trained(case: str):
    maps = members(case)
    product = Product(maps)
    x, grads = inputs(maps)
    with torch.inference_mode():
        before = [one.clone() for one in product(x)]
    results = found(product, maps, x, grads)
    close(results, expected(maps, x, grads))
    close([one.clone() for one in before], results[: len(maps)])
