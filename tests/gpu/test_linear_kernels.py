"""Linear maps on a card: 4 bit read bit for bit, products and gradients against float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from qcore.nn.optim import FlatAdamW
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.qlora.nf4 import NF4, NF4Stack, dequantize
from qcore.nn.qlora.stacked_linear import Stacked

pytestmark = pytest.mark.gpu

F32, BF16 = torch.float32, torch.bfloat16
K = 192
R4, R3, R16 = Lora(r=4, lora_alpha=8), Lora(r=3, lora_alpha=5), Lora(r=16, lora_alpha=16)
STACKS = {
    "wide": [(256, R16, True), (128, R3, True)],
    "wide with small 16-bit maps": [(256, R4, True), (64, R16, True), (32, None, False)],
    "narrow": [(64, R3, True), (32, R4, True)],
    "16-bit, wide": [(256, R4, False), (40, R4, False)],
    "frozen": [(256, None, True), (32, None, False)],
}


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _read():  # type: ignore[no-untyped-def]
    pytest.importorskip("triton")
    from qcore.nn.qlora.nf4_triton import dequantize as read

    return read


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("shape", [(1056, 2560), (7, 64), (2560, 9216), (48, 80)], ids=str)
def test_4_bit_is_read_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype):
    value = torch.randn(shape, device="cuda").to(dtype) / 50
    one, reference = NF4(value, dtype, _read()), NF4(value, dtype)
    assert torch.equal(one.dense(), reference.dense())
    room = torch.full((shape[0], shape[1] + 32), torch.nan, device="cuda", dtype=dtype)
    assert torch.equal(one.into(room[:, : shape[1]]), reference.dense())
    assert room[:, shape[1] :].isnan().all()


def test_slices_are_read_bit_for_bit():
    value = torch.randn(9, 96, 640, device="cuda", dtype=BF16)
    stacks = [NF4Stack((9, 96, 640), BF16, value.device, read) for read in (_read(), dequantize)]
    for stack in stacks:
        stack.put(slice(0, 9), value)
    assert torch.equal(stacks[0].dense(), stacks[1].dense())
    assert torch.equal(stacks[0].dense_slices(slice(2, 7)), stacks[1].dense_slices(slice(2, 7)))
    assert torch.equal(stacks[0].dense_slice(8), stacks[1].dense_slice(8))


def _maps(case: str, dtype: torch.dtype) -> list[Linear]:
    out = []
    for seed, (size, lora, four_bit) in enumerate(STACKS[case]):
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(size, K, generator=generator) / math.sqrt(K)
        module = Linear((size, K), dtype, lora, dequantize=_read())
        module.hold(slice(0, size), value.bfloat16().cuda(), quantize=four_bit, dtype=dtype)
        if lora is not None:
            module.reset_lora(str(seed), 3, torch.device("cuda"))
            with torch.no_grad():
                b = torch.randn(module.lora_B.shape, generator=generator)  # type: ignore[union-attr]
                module.lora_B.copy_(b)  # type: ignore[union-attr]
        out.append(module)
    return out


def _expected(maps: Sequence[Linear], x: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
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


@pytest.mark.parametrize("rows", [1, 77, 256])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("case", STACKS)
def test_a_stack_and_its_members_are_float32s(case: str, dtype: torch.dtype, rows: int):
    maps = _maps(case, dtype)
    x = torch.randn(rows, K, device="cuda").to(dtype)
    grads = [torch.randn(rows, one.shape[0], device="cuda").to(dtype) for one in maps]
    expected = _expected(maps, x, grads)
    bound = 1e-2 if dtype == BF16 else 1e-5
    for stacked in (True, False):
        for one in maps:
            for parameter in one.parameters():
                parameter.grad = None
        inner = x.clone().requires_grad_()
        torch.full((1 << 22,), torch.nan, device="cuda", dtype=dtype)  # what is freed is NaN
        outputs = Stacked(tuple(maps))(inner) if stacked else [one(inner) for one in maps]
        torch.autograd.backward(outputs, grads)
        leaves = [m.grad for one in maps if one.lora for m in (one.lora_A, one.lora_B)]  # type: ignore[union-attr]
        found = [*(y.detach() for y in outputs), inner.grad, *leaves]
        for mine, theirs in zip(found, expected, strict=True):
            assert float((mine - theirs).norm()) <= bound * float(theirs.norm())  # type: ignore[operator]
        assert all(leaf.dtype == F32 for leaf in leaves)  # type: ignore[union-attr]


def test_gradients_in_one_buffer_are_not_copied():
    maps = _maps("wide", BF16)
    stack = Stacked(tuple(maps))
    x = torch.randn(4096, K, device="cuda", dtype=BF16, requires_grad=True)
    dy = torch.randn(4096, 384, device="cuda", dtype=BF16)
    slices = list(torch.split(dy, [256, 128], 1))
    torch.autograd.backward(stack(x), slices)
    outputs = stack(x)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.backward(outputs, slices)
    assert torch.cuda.max_memory_allocated() - before < dy.nbytes


def test_launches():
    from torch.profiler import ProfilerActivity, profile

    for out, into in ((512, 256), (256, 512)):
        module = Linear((out, into), BF16, R16, dequantize=_read())
        value = torch.randn(out, into, device="cuda") / 16
        module.hold(slice(0, out), value, quantize=True, dtype=BF16)
        module.reset_lora("a", 0, value.device)
        optimizer = FlatAdamW([module], lr=1e-3, weight_decay=0.0)
        x = torch.randn(1024, into, device="cuda", dtype=BF16, requires_grad=True)
        dy = torch.randn(1024, out, device="cuda", dtype=BF16)
        torch.autograd.grad(module(x), x, dy)
        counts = []
        made: list[Tensor] = []

        def forward(module: nn.Module = module, x: Tensor = x, made: list[Tensor] = made) -> None:
            made.append(module(x))

        def backward(x: Tensor = x, dy: Tensor = dy, made: list[Tensor] = made) -> None:
            torch.autograd.grad(made[0], x, dy)

        for run in (forward, backward, optimizer.step):
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                run()
                torch.cuda.synchronize()
            names = [event.name for event in seen.events() if "CUDA" in str(event.device_type)]
            counts.append(len([name for name in names if "Synchronize" not in name]))
            print(out, into, run.__name__, *(name[:60] for name in names), sep="\n  ")
        # A product may be split over K and summed by a kernel of its own.
        assert counts[0] <= 5, counts
        assert counts[1] <= 9, counts


def test_the_vector_is_torchs_fused_adamw_bit_for_bit():
    def make() -> list[Linear]:
        return _maps("wide", BF16)

    flat, plain = make(), make()
    mine = FlatAdamW(flat, lr=0.01, weight_decay=0.1)
    listed = [m for one in plain for m in (one.lora_A, one.lora_B)]
    theirs = torch.optim.AdamW(listed, lr=0.01, weight_decay=0.1, fused=True)  # type: ignore[arg-type]
    for step in range(3):
        generator = torch.Generator(device="cuda").manual_seed(step)
        for one, other in zip(flat, plain, strict=True):
            for p, q in ((one.lora_A, other.lora_A), (one.lora_B, other.lora_B)):
                q.grad = torch.randn(q.shape, generator=generator, device="cuda")  # type: ignore[union-attr]
                p.grad += q.grad  # type: ignore[union-attr, operator]
        mine.step()
        theirs.step()
        mine.zero_grad()
    for one, other in zip(flat, plain, strict=True):
        assert torch.equal(one.lora_A, other.lora_A)  # type: ignore[arg-type]
        assert torch.equal(one.lora_B, other.lora_B)  # type: ignore[arg-type]
