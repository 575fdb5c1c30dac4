"""The linear map against bitsandbytes and PEFT: the same bits, the same gradients."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qcore.nn.qlora.linear import Linear
from qcore.nn.qlora.lora_layer import Lora
from qcore.nn.qlora.nf4 import NF4

OUT, IN, T = 96, 64, 7
CPU = torch.device("cpu")
#: Bits a parameter: 4, 8 for each 64 of them, 32 for each 256 of those (QLoRA, section 3.2).
BITS = 4 + 8 / 64 + 32 / (64 * 256)


def weight(out: int = OUT, into: int = IN, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(out, into, generator=generator) / math.sqrt(into)).bfloat16()


def ours(
    lora: Lora | None,
    *,
    quantize: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
) -> Linear:
    module = Linear((OUT, IN), dtype, lora)
    module.hold(slice(0, OUT), weight(), quantize=quantize, dtype=dtype)
    if lora is not None:
        module.reset_lora("layer", seed, CPU)
        assert module.lora_B is not None
        nn.init.normal_(module.lora_B, generator=torch.Generator().manual_seed(seed))
    return module


def four_bit(value: Tensor, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        value.shape[1], value.shape[0], bias=False, compute_dtype=dtype,
        compress_statistics=True, quant_type="nf4",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        value.to(dtype), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return layer.to("cpu")


def theirs(mine: Linear, *, quantize: bool = False) -> nn.Module:
    """PEFT's LoRA layer over the same base, with our A and B."""
    assert mine.lora is not None
    base: nn.Module = nn.Linear(IN, OUT, bias=False)
    base.weight = nn.Parameter(weight().float(), requires_grad=False)
    if quantize:
        base = four_bit(weight(), torch.float32)
    config = peft.LoraConfig(
        r=mine.lora.r,
        lora_alpha=mine.lora.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=mine.lora.lora_dropout,
        use_rslora=mine.lora.use_rslora,
        target_modules=["proj"],
        bias="none",
    )
    model = peft.inject_adapter_in_model(config, nn.ModuleDict({"proj": base}))
    layer = model["proj"]
    assert isinstance(layer, peft.tuners.lora.LoraLayer)
    layer.lora_A["default"].weight.data.copy_(mine.lora_A)  # type: ignore[arg-type]
    layer.lora_B["default"].weight.data.copy_(mine.lora_B)  # type: ignore[arg-type]
    return layer


def run(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def inputs(*lead: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    shape = lead or (T,)
    return (
        torch.randn(*shape, IN, generator=generator),
        torch.randn(*shape, OUT, generator=generator),
    )


def close(found: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    assert found.shape == expected.shape
    scale = float(expected.abs().max())
    assert scale > 0
    assert float((found - expected).abs().max()) <= bound * scale


# -- NF4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (7, 128), (256, 320), (33, 62), (5, 14)])
def test_nf4_is_bitsandbytes_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype):
    value = weight(*shape)
    layer = four_bit(value, dtype)
    mine = NF4(value, dtype)
    reference = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert mine.dense().dtype == dtype
    assert mine.dense().shape == shape
    assert torch.equal(mine.dense(), reference)
    assert torch.equal(mine.packed, layer.weight.data)
    assert not torch.equal(mine.dense(), value.to(dtype))  # it is quantized


def test_nf4_of_a_view_is_that_of_its_copy():
    value = weight(128, 64)[::2]
    assert torch.equal(NF4(value, torch.float32).dense(), NF4(value.clone(), torch.float32).dense())


def test_nf4_gives_a_fresh_tensor():
    held = NF4(weight(), torch.float32)
    first = held.dense()
    first.zero_()
    assert held.dense().any()


def test_nf4_costs_what_it_says():
    value = weight(1024, 1024)
    assert NF4(value, torch.bfloat16).nbytes * 8 / value.numel() == pytest.approx(BITS, rel=1e-3)


def test_a_linear_map_is_held_whole():
    module = Linear((OUT, IN), torch.float32, None)
    with pytest.raises(ValueError, match="held whole"):
        module.hold(slice(0, 8), weight()[:8], quantize=False, dtype=torch.float32)


# -- LoRA against PEFT

LORAS = {
    "alpha is twice r": Lora(r=4, lora_alpha=8),
    "alpha over r is no power of two": Lora(r=6, lora_alpha=5),
    "rank one": Lora(r=1, lora_alpha=3),
    "rank-stabilised": Lora(r=8, lora_alpha=16, use_rslora=True),
}


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("lead", [(T,), (1,), (3, 5)], ids=str)
def test_forward_and_gradients_equal_pefts(case: str, quantize: bool, lead: tuple[int, ...]):
    mine = ours(LORAS[case], quantize=quantize)
    peer = theirs(mine, quantize=quantize)
    x, dy = inputs(*lead)
    (y, dx), (peer_y, peer_dx) = run(mine, x, dy), run(peer, x, dy)
    close(y, peer_y)
    close(dx, peer_dx)
    assert mine.lora_A is not None
    assert mine.lora_B is not None
    close(mine.lora_A.grad, peer.lora_A["default"].weight.grad)  # type: ignore[arg-type]
    close(mine.lora_B.grad, peer.lora_B["default"].weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
def test_dropout_draws_what_peft_draws(quantize: bool):
    mine = ours(Lora(r=4, lora_alpha=8, lora_dropout=0.3), quantize=quantize)
    peer = theirs(mine, quantize=quantize)
    x, dy = inputs()
    torch.manual_seed(5)
    y, dx = run(mine, x, dy)
    torch.manual_seed(5)
    peer_y, peer_dx = run(peer, x, dy)
    close(y, peer_y)
    close(dx, peer_dx)
    close(mine.lora_A.grad, peer.lora_A["default"].weight.grad)  # type: ignore[union-attr, arg-type]
    close(mine.lora_B.grad, peer.lora_B["default"].weight.grad)  # type: ignore[union-attr, arg-type]
    torch.manual_seed(6)
    assert not torch.equal(run(mine, x, dy)[0], y)


def test_dropout_is_off_in_eval():
    mine = ours(Lora(r=4, lora_alpha=8, lora_dropout=0.5)).eval()
    plain = ours(Lora(r=4, lora_alpha=8))
    x, _ = inputs()
    assert torch.equal(mine(x), plain(x))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_the_derivatives(dropout: float):
    mine = ours(Lora(r=3, lora_alpha=5, lora_dropout=dropout), dtype=torch.float64)
    mine.lora_A = nn.Parameter(mine.lora_A.double())  # type: ignore[union-attr]
    mine.lora_B = nn.Parameter(mine.lora_B.double())  # type: ignore[union-attr]
    x = inputs(2, 1)[0].double().requires_grad_()

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(mine, {"lora_A": a, "lora_B": b}, (x,))[:, :, :5]

    assert torch.autograd.gradcheck(function, (x, mine.lora_A, mine.lora_B))


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_before_the_first_step_it_is_the_base_bit_for_bit(dtype: torch.dtype, quantize: bool):
    lora = Lora(r=4, lora_alpha=8)
    module, base = ours(lora, quantize=quantize, dtype=dtype), ours(
        None, quantize=quantize, dtype=dtype)  # fmt: skip
    module.reset_lora("layer", 3, CPU)
    x = inputs()[0].to(dtype)
    assert torch.equal(module(x), base(x))
    assert torch.equal(module(x.requires_grad_()), base(x))


def test_bf16_is_close_to_fp32():
    lora = Lora(r=4, lora_alpha=8)
    x, dy = inputs()
    half, full = ours(lora, dtype=torch.bfloat16), ours(lora)
    y, dx = run(half, x.bfloat16(), dy.bfloat16())
    reference_y, reference_dx = run(full, x.bfloat16().float(), dy.bfloat16().float())
    assert y.dtype == dx.dtype == torch.bfloat16
    close(y.float(), reference_y, 2e-2)
    close(dx.float(), reference_dx, 2e-2)
    assert half.lora_A.grad.dtype == torch.float32  # type: ignore[union-attr]
    close(half.lora_A.grad, full.lora_A.grad, 2e-2)  # type: ignore[union-attr, arg-type]
    close(half.lora_B.grad, full.lora_B.grad, 2e-2)  # type: ignore[union-attr, arg-type]


# -- the frozen map


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
def test_a_frozen_map_is_a_linear_and_its_gradient(quantize: bool):
    module = ours(None, quantize=quantize)
    x, dy = inputs(3, 5)
    y, dx = run(module, x, dy)
    close(y, x @ module.dense().T)
    close(dx, dy @ module.dense())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_an_input_without_gradient_makes_no_graph():
    module = ours(None)
    assert not module(inputs()[0]).requires_grad
    adapted = ours(Lora(r=2, lora_alpha=4))
    y = adapted(inputs()[0])
    y.sum().backward()
    assert adapted.lora_B.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("quantize", [False, True], ids=["fp32", "nf4"])
@pytest.mark.parametrize("case", ["frozen", "adapted", "dropout"])
def test_what_is_saved_for_backward(case: str, quantize: bool):
    loras = {
        "frozen": None,
        "adapted": Lora(r=4, lora_alpha=8),
        "dropout": Lora(r=4, lora_alpha=8, lora_dropout=0.2),
    }
    module = ours(loras[case], quantize=quantize)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = inputs()[0].requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    assert not any(tensor.numel() >= OUT * IN for tensor in saved)  # never the dense weight
    if case == "frozen":
        assert saved == []
    elif case == "adapted":
        shapes = sorted(tuple(tensor.shape) for tensor in saved)
        assert shapes == sorted([(T, IN), (T, 4), (4, IN), (OUT, 4)])


def test_a_weight_that_is_replaced_is_read_again_in_backward():
    module = ours(None)
    x, dy = inputs()
    x.requires_grad_()
    y = module(x)
    other = weight(seed=9).float()
    module.weight = nn.Parameter(other, requires_grad=False)
    y.backward(dy)
    close(x.grad, dy @ other)  # type: ignore[arg-type]


def test_recompute_gives_the_same_gradients():
    x, dy = inputs()
    results = []
    for again in (False, True):
        module = ours(Lora(r=4, lora_alpha=8))
        inner = x.clone().requires_grad_()
        y = checkpoint(module, inner, use_reentrant=False) if again else module(inner)
        y.backward(dy)
        results.append((y, inner.grad, module.lora_A.grad, module.lora_B.grad))  # type: ignore[union-attr]
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


# -- initialisation


def test_initial_values_depend_on_name_and_seed_alone():
    lora = Lora(r=4, lora_alpha=8)
    one, two = Linear((OUT, IN), torch.float32, lora), Linear((OUT, IN), torch.float32, lora)
    one.reset_lora("a", 0, CPU)
    torch.randn(100)
    two.reset_lora("b", 0, CPU)
    assert not torch.equal(one.lora_A, two.lora_A)  # type: ignore[arg-type]
    two.reset_lora("a", 1, CPU)
    assert not torch.equal(one.lora_A, two.lora_A)  # type: ignore[arg-type]
    two.reset_lora("a", 0, CPU)
    assert torch.equal(one.lora_A, two.lora_A)  # type: ignore[arg-type]
    assert not one.lora_B.any()  # type: ignore[union-attr]
    assert one.lora_A.dtype == one.lora_B.dtype == torch.float32  # type: ignore[union-attr]


def test_initial_values_are_distributed_as_pefts():
    module = Linear((8, 4096), torch.float32, Lora(r=64, lora_alpha=8))
    module.reset_lora("a", 0, CPU)
    reference = torch.empty(64, 4096)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    a = module.lora_A
    assert a is not None
    assert float(a.detach().max()) <= 1 / math.sqrt(4096)
    assert float(a.detach().std()) == pytest.approx(float(reference.std()), rel=0.01)


def test_scaling():
    assert Lora(r=8, lora_alpha=16).scaling == 2
    assert Lora(r=16, lora_alpha=8, use_rslora=True).scaling == 2
