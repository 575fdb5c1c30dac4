"""DoRA on linear layers against stock PEFT in float32: outputs, gradients, norms that follow A."""

from __future__ import annotations

import math
from collections.abc import Sequence

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qcore.errors import UsageError
from qcore.nn.optim import FlatAdamW
from qcore.nn.qlora.dora import Magnitudes, changed_norms, scaled
from qcore.nn.qlora.fused import Product, reference
from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora

OUT, IN = 96, 64
CPU = torch.device("cpu")
LORAS = {
    "alpha is twice r": Lora(r=4, lora_alpha=8, use_dora=True),
    "rank one": Lora(r=1, lora_alpha=3, use_dora=True),
    "rank-stabilized": Lora(r=6, lora_alpha=5, use_dora=True, use_rslora=True),
}


def ours(
    lora: Lora | None, out: int = OUT, *, quantize: bool = False,
    dtype: torch.dtype = torch.float32, seed: int = 3, fresh: bool = False,
) -> Linear:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    value = (torch.randn(out, IN, generator=generator) / math.sqrt(IN)).bfloat16()
    module = Linear((out, IN), dtype, lora)
    module.hold(slice(0, out), value, quantize=quantize, dtype=dtype)
    module.reset_lora("layer", seed, CPU)
    if module.lora_B is not None and not fresh:
        with torch.no_grad():
            module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator))
            if module.lora_magnitude_vector is not None:
                noise = torch.randn(module.lora_magnitude_vector.shape, generator=generator)
                module.lora_magnitude_vector.mul_(1 + 0.3 * noise)
    return module


def theirs(mine: Linear) -> nn.Module:
    """PEFT's layer over the values that ours holds, dequantized, with our A, B and m."""
    assert mine.lora is not None
    base = nn.Linear(mine.shape[1], mine.shape[0], bias=False)
    base.weight = nn.Parameter(mine.dense().float(), requires_grad=False)
    config = peft.LoraConfig(
        r=mine.lora.r, lora_alpha=mine.lora.lora_alpha, lora_dropout=mine.lora.lora_dropout,  # type: ignore[arg-type]
        use_rslora=mine.lora.use_rslora, use_dora=True, target_modules=["proj"],
    )  # fmt: skip
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"proj": base}))["proj"]
    assert isinstance(layer, peft.tuners.lora.LoraLayer)
    with torch.no_grad():
        for peer, own in zip(factors(layer), mine.factors, strict=True):
            peer.copy_(own)
    return layer


def factors(layer: nn.Module) -> list[nn.Parameter]:
    sides = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    return [side["default"].weight for side in sides]  # type: ignore[index, union-attr]


def run(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def inputs(*lead: int, out: int = OUT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    shape = lead or (7,)
    return (
        torch.randn(*shape, IN, generator=generator),
        torch.randn(*shape, out, generator=generator),
    )


def close(found: Tensor | None, expected: Tensor | None, bound: float = 2e-6) -> None:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= bound * float(expected.norm()) > 0


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("lead", [(7,), (1,), (3, 5)], ids=str)
def test_forward_and_gradients_equal_pefts(case: str, quantize: bool, lead: tuple[int, ...]):
    mine = ours(LORAS[case], quantize=quantize)
    peer = theirs(mine)
    x, dy = inputs(*lead)
    for found, expected in zip(run(mine, x, dy), run(peer, x, dy), strict=True):
        close(found, expected)
    for own, other in zip(mine.factors, factors(peer), strict=True):
        close(own.grad, other.grad)


def test_the_magnitude_starts_as_in_peft():
    mine = ours(LORAS["rank one"], quantize=True, fresh=True)
    base = bnb.nn.Linear4bit(IN, OUT, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    value = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)) / math.sqrt(IN)
    base.weight = bnb.nn.Params4bit(
        value.bfloat16().float(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    config = peft.LoraConfig(r=1, use_dora=True, target_modules=["proj"])
    made = peft.inject_adapter_in_model(config, nn.ModuleDict({"proj": base.to("cpu")}))["proj"]
    close(mine.lora_magnitude_vector, factors(made)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [False, True], ids=["16 bit", "nf4"])
def test_before_the_first_step_it_is_the_base_bit_for_bit(quantize: bool, dtype: torch.dtype):
    x = inputs()[0].to(dtype)
    mine = ours(LORAS["rank one"], quantize=quantize, dtype=dtype, fresh=True)
    assert torch.equal(mine(x), ours(None, quantize=quantize, dtype=dtype)(x))


def test_bf16_is_close_to_pefts_float32():
    lora = LORAS["alpha is twice r"]
    x, dy = (value.bfloat16() for value in inputs(129))
    mine = ours(lora, dtype=torch.bfloat16)
    peer = theirs(mine)
    for found, expected in zip(run(mine, x, dy), run(peer, x.float(), dy.float()), strict=True):
        assert found.dtype == torch.bfloat16
        close(found.float(), expected, 1e-2)
    for own, other in zip(mine.factors, factors(peer), strict=True):
        assert own.grad is not None
        assert own.grad.dtype == torch.float32
        close(own.grad, other.grad, 1e-2)


def test_dropout_draws_what_peft_draws():
    mine = ours(Lora(r=4, lora_alpha=8, lora_dropout=0.3, use_dora=True))
    peer, (x, dy) = theirs(mine), inputs()
    torch.manual_seed(5)
    found = run(mine, x, dy)
    torch.manual_seed(5)
    for one, other in zip(found, run(peer, x, dy), strict=True):
        close(one, other)
    for own, theirs_ in zip(mine.factors, factors(peer), strict=True):
        close(own.grad, theirs_.grad)
    assert torch.equal(mine.eval()(x), ours(LORAS["alpha is twice r"])(x))


@pytest.mark.parametrize("flat", [False, True], ids=["torch's AdamW", "one vector"])
@pytest.mark.parametrize("again", [False, True], ids=["saved", "recomputed"])
def test_steps_follow_pefts(flat: bool, again: bool):
    """The norms are those of A and B after each update, also where it bumps no version."""
    mine = ours(LORAS["alpha is twice r"], quantize=True)
    peer = theirs(mine)
    options = {"lr": 3e-2, "weight_decay": 0.1}
    optimizer: torch.optim.Optimizer = (
        FlatAdamW([mine], **options) if flat else torch.optim.AdamW(mine.factors, **options)  # type: ignore[arg-type]
    )
    other = torch.optim.AdamW(factors(peer), **options)  # type: ignore[arg-type]
    for step in range(4):
        for _ in range(2):  # micro-batches
            x, dy = inputs(5 + step)
            y = checkpoint(mine, x.requires_grad_(), use_reentrant=False) if again else mine(x)
            y.backward(dy)
            peer(x.detach()).backward(dy)
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
    for own, theirs_ in zip(mine.factors, factors(peer), strict=True):
        close(own, theirs_, 1e-4)


def _stack() -> list[Linear]:
    loras = (LORAS["alpha is twice r"], None, LORAS["rank-stabilized"])
    return [ours(lora, out, seed=n) for n, (lora, out) in enumerate(zip(loras, (40, 24, 8)))]


@pytest.mark.parametrize("rows", [1, 65])
def test_a_fused_product_is_its_members(rows: int):
    """As on a GPU: one buffer for all outputs, of which each gradient may lie apart."""

    def outputs(maps: Sequence[Linear], x: Tensor, *, fused: bool) -> list[Tensor]:
        return list(Product(maps)(x)) if fused else [one(x) for one in maps]

    results = []
    for fused in (True, False):
        maps, x = _stack(), inputs(rows)[0].requires_grad_()
        made = outputs(maps, x, fused=fused)
        loss = sum((y.sin() * (n + 1)).sum() for n, y in enumerate(made))
        assert isinstance(loss, Tensor)
        loss.backward()
        grads = [factor.grad for one in maps for factor in one.factors]
        results.append([*made, x.grad, *grads])
    assert len(results[0]) == 3 + 1 + 6
    for found, expected in zip(*results, strict=True):
        close(found, expected)


def test_gradients_are_added_where_the_optimizer_keeps_them():
    one, other = ours(LORAS["rank one"]), ours(LORAS["rank one"])
    optimizer = FlatAdamW([one], lr=1e-3, weight_decay=0.0)
    x, dy = inputs()
    for _ in range(2):
        run(one, x, dy)
        run(other, x, dy)
    assert optimizer.flat.grad is not None
    assert one.lora_magnitude_vector is not None
    assert one.lora_magnitude_vector.grad is not None
    storage = one.lora_magnitude_vector.grad.untyped_storage().data_ptr()
    assert storage == optimizer.flat.grad.untyped_storage().data_ptr()
    for mine, peer in zip(one.factors, other.factors, strict=True):
        close(mine.grad, peer.grad)


def test_the_dense_sum_is_never_made():
    """Nothing of the weight's size is made beside the dequantized weight itself."""
    mine = ours(LORAS["alpha is twice r"], 512, quantize=True)
    made: list[tuple[int, ...]] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.numel() >= 512 * IN:
                made.append((str(function), tuple(result.shape)))  # type: ignore[arg-type]
            return result

    mine.kept_norms()
    with Seen(), torch.no_grad():
        changed_norms(mine)
    assert all("dequantize" in str(name) or "view" in str(name) or "split" in str(name)
               or "empty" in str(name) for name, _ in made), made  # fmt: skip


def test_an_output_without_a_gradient_makes_no_graph():
    mine = ours(LORAS["rank one"])
    x = inputs()[0]
    with torch.no_grad():
        assert not mine(x).requires_grad
    y = scaled(mine, x @ mine.dense().T, Magnitudes([mine]))
    y.sum().backward()
    assert mine.lora_magnitude_vector is not None
    assert mine.lora_magnitude_vector.grad is not None


def test_norms_are_kept_only_by_a_layer_that_reads_them_again():
    """The planner counts what the first forward keeps; `reset_lora` keeps nothing beside it."""
    single, fused = ours(LORAS["rank one"]), ours(LORAS["rank one"])
    assert single._kept_norms is None
    x = inputs()[0]
    single(x)
    Product([fused])(x)
    assert single._kept_norms is not None
    assert fused._kept_norms is None


def test_other_values_have_other_norms():
    mine = ours(LORAS["rank one"])
    mine(inputs()[0])
    value = torch.randn(OUT, IN).bfloat16()
    twin = Linear((OUT, IN), torch.float32, None)
    twin.hold(slice(0, OUT), value, quantize=True, dtype=torch.float32)
    assert twin.nf4 is not None
    mine.hold_codes(twin.nf4.packed, twin.nf4.state)
    close(mine.kept_norms(), torch.linalg.norm(twin.dense(), dim=1))


@pytest.mark.parametrize("dora", [True, False])
def test_a_backend_that_ignores_dora_is_refused(dora: bool):
    def plain(x: Tensor, product: Product) -> tuple[Tensor, ...]:
        outputs = []
        for one in product.members:
            y = x @ one.dense().T
            if one.lora is not None:
                assert one.lora_A is not None
                assert one.lora_B is not None
                y = y + (x @ one.lora_A.T) @ one.lora_B.T * one.lora.scaling
            outputs.append(y)
        return tuple(outputs)

    mine = ours(LORAS["rank one"] if dora else Lora(r=2, lora_alpha=4))
    product = Product([mine], plain)
    if not dora:
        close(product(inputs()[0])[0], mine(inputs()[0]))
        return
    with pytest.raises(UsageError, match="computes plain LoRA") as error:
        product(inputs()[0])
    assert error.value.code == "QC-KERNEL-003"
    product.compute = reference
    product(inputs()[0])
