"""What surrounds a QLoRA product, interpreted: weights bit for bit, sums against float64.

In float16: the interpreter truncates bfloat16 where a card rounds.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from support.tiers import fast
from torch import Tensor, nn

from qcore.nn.optim import FlatAdamW
from qcore.nn.qlora import dora_triton
from qcore.nn.qlora import fused as plain
from qcore.nn.qlora import fused_triton as kernels
from qcore.nn.qlora.fused import Product
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora

CPU = torch.device("cpu")
K, F16 = 64, torch.float16
R4, R3, R8 = Lora(r=4, lora_alpha=8), Lora(r=3, lora_alpha=5), Lora(r=8, lora_alpha=8)
D4 = Lora(r=4, lora_alpha=8, use_dora=True)
#: (out, LoRA, 4-bit) of each member.
STACKS = {
    "wide": [(96, R4, True), (640, R3, True)],
    "wide with small 16-bit maps": [(96, R4, True), (64, R8, True), (5, None, False)],
    "narrow": [(8, R3, True), (16, R4, True)],
    "one, wide": [(128, R4, True)],
    "one, narrow": [(32, R3, True)],
    "one of two carries": [(96, None, True), (32, R8, True)],
    "frozen": [(96, None, True), (5, None, False)],
    "16-bit": [(96, R4, False), (33, R4, False)],
    "DoRA": [(96, D4, True), (33, R3, True), (7, None, False)],
    "DoRA, narrow": [(32, D4, True)],
}


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEWEST", 1)


def members(case: str) -> list[Linear]:
    made = []
    for seed, (out, lora, four_bit) in enumerate(STACKS[case]):
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(out, K, generator=generator) / math.sqrt(K)
        module = Linear((out, K), F16, lora)
        module.hold(slice(0, out), value.half(), quantize=four_bit, dtype=F16)
        if lora is not None:
            module.reset_lora(str(seed), 3, CPU)
            nn.init.normal_(module.lora_B, generator=generator)  # type: ignore[arg-type]
            if module.lora_magnitude_vector is not None:
                module.lora_magnitude_vector.data.mul_(0.5)  # so that it is far from the norm
        made.append(module)
    return made


def given(maps: list[Linear], tokens: int) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, K, generator=generator).half()
    return x, [torch.randn(tokens, m.shape[0], generator=generator).half() for m in maps]


def run(maps: list[Linear], compute: object, x: Tensor, grads: list[Tensor]) -> list[Tensor]:
    product = Product(maps)
    product.compute = compute  # type: ignore[assignment]
    x = x.clone().requires_grad_()
    y = product(x)
    torch.autograd.backward(y, grads)
    leaves = [m.grad for one in maps if one.lora for m in one.factors]
    return [*(one.detach() for one in y), x.grad, *(g.clone() for g in leaves)]  # type: ignore[list-item, union-attr]


@pytest.mark.parametrize("place", [True, False])
@pytest.mark.parametrize("case", [name for name in STACKS if name != "16-bit"])
def test_weights_bit_for_bit_and_lora_in_its_place(case: str, place: bool):
    maps = members(case)
    torchs, ours = Product(maps), Product(maps)
    like = torch.empty(1, dtype=F16)
    expected = torchs.working(like)
    found = ours.working(like, kernels.TritonKernels)
    if expected is None:
        assert found is None
    read = Product.buffer if place else Product.weights
    one, two = read(torchs, expected, like), read(ours, found, like, kernels.TritonKernels)
    assert torch.equal(one, two)
    if expected is not None and found is not None:
        assert torch.equal(expected.a, found.a)
        assert torch.equal(expected.b, found.b)


@pytest.mark.parametrize("tokens", fast([1, 65, 200], 65))
@pytest.mark.parametrize("into", fast([64, 96, 200], 96))
@pytest.mark.parametrize("turned", [True, False])
def test_thin(tokens: int, into: int, turned: bool):
    room = torch.full((tokens, into + 8), math.nan, dtype=F16)
    x = room[:, :into].normal_()
    right = torch.randn(into, 24).half().t() if turned else torch.randn(24, into).half()
    both, out = kernels.thin(x, right, beside=True)
    exact = x.double() @ right.double().t()
    assert both is not None
    assert torch.equal(both[:, :into], x)
    assert torch.equal(both[:, into:], out)
    assert float((out.double() - exact).norm()) <= 1e-3 * float(exact.norm())
    assert torch.equal(kernels.thin(x, right, beside=False)[1], out)


@pytest.mark.parametrize("tokens", fast([1, 255, 256, 600], 255))
@pytest.mark.parametrize("out", fast([1, 96, 256, 300], 300))
@pytest.mark.parametrize("dtype", [F16, torch.float32], ids=str)
def test_scale_gradient(tokens: int, out: int, dtype: torch.dtype):
    room = torch.full((2, tokens, out + 8), math.nan, dtype=dtype)
    dy, y = room[:, :, :out].normal_()
    scale = torch.rand(out) + 0.5
    scaled, dots = kernels.TritonKernels.scale_gradient(dy, y, scale)
    assert (scaled.dtype, scaled.stride()) == (dtype, (out, 1))
    assert torch.equal(scaled, (dy.float() * scale).to(dtype))
    exact = (dy.double() * y.double()).sum(0)
    assert float((dots - exact).norm()) <= 1e-6 * float((dy * y).double().norm())


@pytest.mark.parametrize("accumulates", fast([True, False], True), ids=["added", "handed over"])
@pytest.mark.parametrize("tokens", fast([1, 130], 130))
@pytest.mark.parametrize("case", STACKS)
def test_it_is_what_torch_computes(case: str, tokens: int, accumulates: bool):
    results = []
    for compute in (plain.reference, kernels.linear):
        maps = members(case)
        if accumulates and any(one.lora for one in maps):
            FlatAdamW([one for one in maps if one.lora], lr=1e-3, weight_decay=0.0)
            for one in maps:
                for matrix in one.factors:
                    matrix.grad.fill_(0.5)  # type: ignore[union-attr]
        results.append(run(maps, compute, *given(maps, tokens)))
    for torchs, ours in zip(*results, strict=True):
        assert torchs.shape == ours.shape
        assert torchs.dtype == ours.dtype
        off = float((torchs.double() - ours.double()).norm())
        assert off <= 2e-3 * float(torchs.double().norm())


def test_gradients_of_a_that_do_not_lie_together():
    results = []
    for compute in (plain.reference, kernels.linear):
        maps = members("wide")
        optimizers = [FlatAdamW([one], lr=1e-3, weight_decay=0.0) for one in maps]
        results.append(run(maps, compute, *given(maps, 70)))
        del optimizers
    for torchs, ours in zip(*results, strict=True):
        assert float((torchs.double() - ours.double()).norm()) <= 2e-3 * float(
            torchs.double().norm()
        )


@pytest.mark.parametrize("case", ["wide", "narrow"])
@pytest.mark.slow
def test_an_update_is_seen(case: str):
    maps = members(case)
    optimizer = FlatAdamW(maps, lr=0.5, weight_decay=0.0)
    product = Product(maps)
    product.compute = kernels.linear
    x, grads = given(maps, 9)
    for _ in range(3):
        torch.autograd.backward(product(x.clone().requires_grad_()), grads)
        optimizer.step()
        optimizer.zero_grad()
        fresh = [one.detach() for one in Product(maps)(x)]
        for one, other in zip(product(x), fresh, strict=True):
            assert float((one - other).norm()) <= 2e-3 * float(other.norm())


@pytest.mark.parametrize("case", ["wide", "narrow"])
@pytest.mark.slow
def test_another_scaling_and_another_adapter_are_seen(case: str):
    """Where the masters lie does not tell: the numbers may change, or a rank in the same place."""
    maps = members(case)
    FlatAdamW(maps, lr=0.5, weight_decay=0.0)
    product = Product(maps)
    product.compute = kernels.linear
    x, grads = given(maps, 9)
    for lora in (Lora(r=4, lora_alpha=64), None, Lora(r=2, lora_alpha=2)):
        maps[1].lora = lora
        if lora is not None and lora.r == 2:
            a, b = maps[1].lora_A, maps[1].lora_B
            assert a is not None
            assert b is not None
            a.data = a.data.flatten()[: 2 * K].view(2, K)
            b.data = b.data.flatten()[: 2 * maps[1].shape[0]].view(-1, 2)
            for matrix in (a, b):
                assert matrix.grad is not None
                matrix.grad = torch.zeros_like(matrix)
        elif lora is not None:
            maps[1].lora = Lora(r=maps[1].lora_A.shape[0], lora_alpha=64)  # type: ignore[union-attr]
        results = []
        for compute in (plain.reference, kernels.linear):
            for one in maps:
                if one.lora is not None:
                    one.lora_A.grad.zero_()  # type: ignore[union-attr]
                    one.lora_B.grad.zero_()  # type: ignore[union-attr]
            product.compute = compute
            leaf = x.clone().requires_grad_()
            y = product(leaf)
            torch.autograd.backward(y, grads)
            matrices = [m for one in maps if one.lora for m in (one.lora_A, one.lora_B)]
            results.append([*y, leaf.grad, *(m.grad.clone() for m in matrices)])  # type: ignore[union-attr]
        for torchs, ours in zip(*results, strict=True):
            off = float((torchs.double() - ours.double()).detach().norm())
            assert off <= 2e-3 * float(torchs.detach().double().norm()), lora


@pytest.mark.parametrize("after", ["reference", "again", "alone"])
@pytest.mark.parametrize("case", ["wide", "narrow"])
def test_a_fill_that_failed_leaves_nothing_behind(
    case: str, after: str, monkeypatch: pytest.MonkeyPatch
):
    maps = members(case)
    x, _ = given(maps, 9)
    want = [one.detach() for one in Product(maps)(x)]
    product = Product(maps)
    product.compute = kernels.linear
    with monkeypatch.context() as broken:
        broken.setattr(kernels, "fill", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            product(x)
    assert product._working is not None
    product._working.a.fill_(7)
    product._working.b.fill_(7)
    if after == "alone":
        loras = [one.lora for one in maps]
        for one in maps:
            one.lora = None
        product(x)
        for one, lora in zip(maps, loras, strict=True):
            one.lora = lora
    product.compute = plain.reference if after == "reference" else kernels.linear
    for one, other in zip(product(x), want, strict=True):
        assert float((one.detach() - other).norm()) <= 2e-3 * float(other.norm())


def test_launches(monkeypatch: pytest.MonkeyPatch):
    counted: Counter[str] = Counter()
    launch = kernels.launch

    def told(kernel: object, *args: object, **more: object) -> None:
        counted[kernel.__name__] += 1  # type: ignore[attr-defined]
        launch(kernel, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "launch", told)
    for case in ("wide", "narrow"):
        maps = members(case)
        FlatAdamW(maps, lr=1e-3, weight_decay=0.0)
        run(maps, kernels.linear, *given(maps, 5))
        assert counted == {"_fill": 2, "_thin": 2, "_outer": 1}
        counted.clear()
    monkeypatch.setattr(dora_triton, "launch", told)
    run(members("DoRA, narrow"), kernels.linear, *given(members("DoRA, narrow"), 5))
    assert counted["_scale_gradient"] == 1


@pytest.mark.slow
def test_the_check_passes_and_sees_faults(monkeypatch: pytest.MonkeyPatch):
    from qcore.nn.qlora import fused_verify as product_verify

    monkeypatch.setattr(product_verify, "_DTYPE", F16)
    monkeypatch.setattr(product_verify, "FEWEST", 10)
    assert product_verify.verify(CPU).good
    right = kernels.TritonKernels.outer

    def twice(*args: Tensor) -> bool:
        right(*args)  # type: ignore[arg-type]
        return right(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels.TritonKernels, "outer", staticmethod(twice))
    assert not product_verify.verify(CPU).good
