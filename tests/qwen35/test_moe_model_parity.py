"""Mixture of experts from a folder: logits, loss and gradients against the stock classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from support.e2e_kit import (
    GATES,
    PREFIX,
    ROOT,
    documents,
    figure,
    our_logits,
    ours,
    random_b,
    stock,
    stock_logits,
    wanted,
    wrapped,
    write_stock,
)
from support.moe_kit import rewrite
from torch import Tensor, nn

from qcore.api.blocks import Packed
from qcore.nn.model import Model
from qcore.nn.moe.experts import Experts
from qcore.nn.qlora.lora_layer import Lora

LORA = Lora(r=4, lora_alpha=6)
EVERYTHING = ("attn", "gdn", "experts", "shared_expert", "gdn_gates", "router")
STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LENGTHS = (37, 1, 70, 5)
#: Each further layer multiplies what rounding did before it, on either side: experts jump.
LAYERS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
CASES = [
    ("text", True, "apart"),
    ("text", False, "fused"),
    ("vl", True, "fused"),
    ("vl", False, "apart"),
]
#: Maps of an nn.Linear that training hits, by their last name.
MODULES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj",
    "up_proj", "down_proj",
)  # fmt: skip
Bases = Callable[[str, bool, str], Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """The folder of a class, tied or not, in a layout; written once."""
    made: dict[tuple[str, bool, str], Path] = {}

    def get(kind: str, tied: bool, layout: str) -> Path:
        key = kind, tied, layout
        if key not in made:
            home = tmp_path_factory.mktemp(kind)
            written = write_stock(home / "stock", kind, tied=tied, moe=True, **LAYERS)
            made[key] = rewrite(written, home / layout, layout)
        return made[key]

    return get


def gap(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).detach().abs().max())


def check_logits(model: Model, reference: nn.Module) -> None:
    docs = documents(LENGTHS)
    theirs = stock_logits(reference, docs)
    assert 0.3 < float(theirs.abs().max()) < 1
    found = gap(our_logits(model, docs), theirs)
    figure(f"logits differ by {found:.1e} of {float(theirs.abs().max()):.2f}")
    assert found <= 1e-5


@pytest.mark.parametrize(("kind", "tied", "layout"), CASES)
def test_logits(base: Bases, kind: str, tied: bool, layout: str) -> None:
    folder = base(kind, tied, layout)
    check_logits(ours(folder), stock(folder, kind, moe=True))


def test_logits_of_the_text_class_from_a_vision_language_folder(base: Bases) -> None:
    folder = base("vl", True, "fused")
    check_logits(ours(folder), stock(folder, "text", moe=True))


def test_both_layouts_load_the_same_numbers(base: Bases) -> None:
    fused, apart = (ours(base("text", True, layout)) for layout in ("fused", "apart"))
    values = dict(fused.named_parameters())
    for name, parameter in apart.named_parameters():
        assert torch.equal(parameter, values[name]), name
    docs = documents(LENGTHS)
    assert torch.equal(our_logits(fused, docs), our_logits(apart, docs))


# -- loss and gradients of adapters


def peer_of(folder: Path, kind: str, *, router: bool = False, r: int = 4) -> Any:
    """Stock PEFT on the stock class, with LoRA on experts and on every linear map."""
    return wrapped(
        stock(folder, kind, moe=True),
        r=r, lora_alpha=6, target_modules=[*MODULES, *(GATES if router else ()),
        *(["shared_expert_gate"] if router else [])],
        target_parameters=[*STACKS, *(["mlp.gate.weight"] if router else [])],
    )  # fmt: skip


def sides(peer: Any, kind: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(A, B) of stock PEFT by the canonical name of the weight."""
    found = {}
    for path, module in peer.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        name = path.removeprefix("base_model.model.").replace(PREFIX[kind], ROOT, 1)
        name = name.replace(".base_layer", "")
        leaf = getattr(module, "parameter_name", "weight")
        pair = module.lora_A["default"].weight, module.lora_B["default"].weight
        found[f"{name}.{leaf}"] = pair
    return found


def stock_loss(reference: Any, docs: list[Tensor], targets: list[Tensor]) -> Tensor:
    total: Tensor = torch.zeros(())
    for ids, target in zip(docs, targets, strict=True):
        logits = reference(input_ids=ids[None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
    return total / sum(int((target >= 0).sum()) for target in targets)


def same_adapter(model: Model, theirs: dict[str, tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Give stock PEFT's layers our random matrices, byte for byte: one layout.

    Of a size that leaves float32 its digits: with ten times larger ones either side is 1e-3 off
    float64 in layer 0, and the bounds below would say nothing.
    """
    random_b(model, size=0.03)
    adapters = dict(model.adapters())
    assert theirs.keys() == adapters.keys()
    with torch.no_grad():
        for name, (a, b) in theirs.items():
            assert a.shape == adapters[name].lora_A.shape, name
            a.copy_(adapters[name].lora_A)
            b.copy_(adapters[name].lora_B)


def worst_gradient(
    model: Model, theirs: dict[str, tuple[nn.Parameter, nn.Parameter]]
) -> tuple[float, float]:
    """(largest relative difference, that of experts)."""
    worst, of_experts = 0.0, 0.0
    for name, module in model.adapters():
        for mine, other in zip((module.lora_A, module.lora_B), theirs[name], strict=True):
            assert mine is not None
            assert mine.grad is not None
            largest = float(other.grad.abs().max())
            assert largest > 0, name
            off = gap(mine.grad, other.grad) / largest
            worst = max(worst, off)
            of_experts = max(of_experts, off if isinstance(module, Experts) else 0)
    return worst, of_experts


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("kind", "tied", "layout"), [CASES[0], CASES[2]])
def test_loss_and_gradients(
    base: Bases, kind: str, tied: bool, layout: str, recompute: bool
) -> None:
    folder = base(kind, tied, layout)
    model = ours(folder, lora=LORA, groups=EVERYTHING)
    peer = peer_of(folder, kind, router=True)
    theirs = sides(peer, kind)
    same_adapter(model, theirs)
    docs = documents(LENGTHS)
    targets = wanted(docs)
    expected = stock_loss(peer, docs, targets)
    expected.backward()
    batch = Packed.of(docs, targets)
    policy = "full" if recompute else "none"
    found = model.train().loss(batch, recompute=policy) / len(batch.supervised())
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    worst, experts = worst_gradient(model, theirs)
    figure(
        f"{len(theirs)} pairs: loss {gap(found, expected):.1e}, gradients {worst:.1e} relative, "
        f"of experts {experts:.1e}"
    )
    assert worst <= 1e-4


# -- with the load-balancing term


@pytest.mark.parametrize("kind", ["text", "vl"])
def test_the_load_balancing_term(base: Bases, kind: str) -> None:
    """Loss and gradients of ``loss + c * aux``, c large enough to matter, recomputed or not."""
    folder = base(kind, True, "fused")
    docs, grads, coefficient = documents((65,)), [], 0.5
    targets = wanted(docs)
    peer = peer_of(folder, kind, router=True)
    theirs = sides(peer, kind)
    for recompute in (False, True):
        model = ours(folder, lora=LORA, groups=EVERYTHING)
        same_adapter(model, theirs)
        batch = Packed.of(docs, targets)
        policy = "full" if recompute else "none"
        loss = model.train().loss(batch, recompute=policy) / len(batch.supervised())
        aux = model.trunk.aux_loss(batch)
        assert aux is not None
        plain, total = loss.item(), loss + coefficient * aux
        total.backward()
        grads.append({n: p.grad for n, p in model.trainable()})
    text = peer.config if kind == "text" else peer.config.text_config
    text.router_aux_loss_coef = peer.base_model.model.router_aux_loss_coef = coefficient
    labels = torch.cat([docs[0].new_full((1,), -100), targets[0][:-1]])
    told = peer(input_ids=docs[0][None], labels=labels[None], use_cache=False,
                output_router_logits=True)  # fmt: skip
    assert told.aux_loss.item() == pytest.approx(aux.item(), rel=1e-6)
    assert told.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert abs(told.loss.item() - plain) > 0.5
    told.loss.backward()
    worst, _ = worst_gradient(model, theirs)
    figure(f"aux {aux.item():.4f}, loss {total.item():.4f}: gradients {worst:.1e} relative")
    assert worst <= 1e-4
    apart = max(gap(grads[0][name], grads[1][name]) for name in grads[0])
    figure(f"recomputed or kept: gradients differ by {apart:.1e}")
    assert apart == 0


def test_without_the_term_the_gradient_is_another(base: Bases) -> None:
    """So the comparison above would show a term that is dropped when layers run again."""
    model = ours(base("text", True, "fused"), lora=LORA, groups=EVERYTHING)
    random_b(model)
    batch = Packed.of(documents((65,)), wanted(documents((65,))))
    (model.train().loss(batch, recompute="full") / len(batch.supervised())).backward()
    name = f"{ROOT}layers.1.mlp.gate"
    before = dict(model.trainable())[f"{name}.lora_A"].grad.clone()
    batch = Packed.of(documents((65,)), wanted(documents((65,))))
    model.loss(batch, recompute="full")
    aux = model.trunk.aux_loss(batch)
    assert aux is not None
    for _, parameter in model.trainable():
        parameter.grad = None
    aux.backward()
    after = dict(model.trainable())[f"{name}.lora_A"].grad
    assert float(after.abs().max()) > 1e-3 * float(before.abs().max())


# -- four bit


def in_four_bit(model: nn.Module) -> nn.Module:
    """What training holds in NF4, quantized and read back by bitsandbytes, slice by slice."""
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path.rpartition(".")[2] in MODULES:
                module.weight.copy_(rounded(module.weight))
            if path.endswith(".experts"):
                for stack in (module.gate_up_proj, module.down_proj):
                    for weight in stack:
                        weight.copy_(rounded(weight))
    return model


def rounded(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    state.dtype = dtype
    # Rows of one block: bitsandbytes' CPU kernel misreads rows of 48 (20 % off, not 9).
    state.shape = torch.Size((weight.numel() // 64, 64))
    value: Tensor = bnb.dequantize_4bit(packed, state)
    return value.view_as(weight)


@pytest.mark.parametrize("layout", ["fused", "apart"])
def test_experts_in_four_bit_are_bitsandbytes_s(base: Bases, layout: str) -> None:
    folder = base("text", True, layout)
    model, reference = ours(folder, quantize=True), in_four_bit(stock(folder, "text", moe=True))
    stacks = 0
    for name, module in model.lora_layers.items():
        if isinstance(module, Experts):
            stock_name = name.replace(ROOT, "model.", 1)
            weight = reference.get_parameter(stock_name)
            assert module.four_bit
            for number in range(module.shape[0]):
                assert torch.equal(module.dense_slice(number), weight[number]), name
            assert torch.equal(module.dense_slices(slice(1, 5)), weight[1:5])
            stacks += 1
    assert stacks == 6
    check_logits(model, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_neighbours_read_back_together_are_each_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    """Slices whose blocks of scales end with them are read in one launch: the same numbers."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128}
    folder = write_stock(tmp_path, "text", moe=True, dtype=torch.bfloat16, **(LAYERS | sizes))
    model, original = ours(folder, quantize=True, dtype=dtype), stock(folder, "text", moe=True)
    for name, module in model.lora_layers.items():
        if isinstance(module, Experts):
            weight = original.get_parameter(name.replace(ROOT, "model.", 1))
            each = [rounded(one.detach().bfloat16(), dtype) for one in weight]
            assert torch.equal(module.dense_slices(slice(0, 6)), torch.stack(each)), name
            assert torch.equal(module.dense_slices(slice(2, 4)), torch.stack(each[2:4])), name
            assert torch.equal(module.dense_slice(3), each[3]), name


def test_gradients_under_four_bit(base: Bases) -> None:
    """The whole model, against a reference on dequantized weights."""
    folder = base("text", False, "fused")
    docs = documents(LENGTHS)
    targets = wanted(docs)
    model = ours(folder, lora=LORA, quantize=True)
    peer = wrapped(in_four_bit(stock(folder, "text", moe=True)), r=4, lora_alpha=6,
                   target_modules=list(MODULES), target_parameters=list(STACKS))  # fmt: skip
    theirs = sides(peer, "text")
    same_adapter(model, theirs)
    batch = Packed.of(docs, targets)
    (model.train().loss(batch) / len(batch.supervised())).backward()
    stock_loss(peer, docs, targets).backward()
    worst, experts = worst_gradient(model, theirs)
    figure(f"NF4: gradients {worst:.1e} off dequantized weights', experts' {experts:.1e}")
    assert worst <= 1e-4


def test_gradients_of_one_block_under_four_bit(tmp_path: Path) -> None:
    """The same rows through one block: no other layer's rounding and no routing that flips.

    Of dequantized weights exactly, which here can be 1e-5. Of the original weights as those are
    off: a gradient of A goes through two maps and SiLU between them, one of B through one, so
    it is off by at most three times what the weights are.

    In-dimensions are multiples of 64: others bitsandbytes 0.50 reads back wrongly on a CPU.
    """
    sizes = {"hidden_size": 64, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 64}
    folder = write_stock(tmp_path, "text", moe=True, **(LAYERS | sizes))
    model = ours(folder, lora=LORA, quantize=True)
    plain, held = stock(folder, "text", moe=True), in_four_bit(stock(folder, "text", moe=True))
    every = [
        torch.cat([p.flatten() for n, p in m.named_parameters() if ".experts." in n]).detach()
        for m in (plain, held)
    ]
    error = float((every[1] - every[0]).norm() / every[0].norm())
    assert 0.08 < error < 0.11
    peers = [
        wrapped(m, r=4, lora_alpha=6, target_modules=list(MODULES), target_parameters=list(STACKS))
        for m in (held, plain)
    ]
    theirs = [sides(peer, "text") for peer in peers]
    same_adapter(model, theirs[0])
    same_adapter(model, theirs[1])
    worst, off = 0.0, {"A": 0.0, "B": 0.0}
    for number, layer in enumerate(model.trunk.layers):
        generator = torch.Generator().manual_seed(number)
        x, weights = (torch.randn(65, 64, generator=generator) for _ in range(2))
        (layer.mlp(x, Packed.of([torch.zeros(65, dtype=torch.int64)])) * weights).sum().backward()
        for peer in peers:
            block = peer.base_model.model.model.layers[number].mlp
            (block(x[None])[0] * weights).sum().backward()
        for stack in STACKS:
            name = f"{ROOT}layers.{number}.{stack}"
            module = model.lora_layers[name]
            for n, (side, mine) in enumerate((("A", module.lora_A), ("B", module.lora_B))):
                dequantized, original = (found[name][n].grad for found in theirs)
                largest = float(dequantized.abs().max())
                assert largest > 0.01
                worst = max(worst, gap(mine.grad, dequantized) / largest)
                off[side] = max(off[side], float((mine.grad - original).norm() / original.norm()))
    figure(
        f"NF4, one block: weights off by {error:.1%}; gradients {worst:.1e} off the dequantized "
        f"reference, of the original's A {off['A']:.1%}, B {off['B']:.1%} at most"
    )
    assert worst <= 1e-5
    assert 0.01 < max(off.values()) <= 3 * error


@pytest.mark.parametrize("quantize", [False, True], ids=["16 bit", "4 bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_step_0_is_the_base_bit_for_bit(base: Bases, dtype: torch.dtype, quantize: bool) -> None:
    folder, docs = base("vl", True, "fused"), documents(LENGTHS)
    adapted = ours(folder, lora=LORA, groups=EVERYTHING, dtype=dtype, quantize=quantize)
    bare = ours(folder, dtype=dtype, quantize=quantize)
    assert torch.equal(our_logits(adapted, docs), our_logits(bare, docs))
    random_b(adapted)
    assert not torch.equal(our_logits(adapted, docs), our_logits(bare, docs))


@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_gradients_of_experts_err_no_more_than_peft_s(tmp_path: Path, seed: int) -> None:
    """One block, sizes that transformers' grouped product takes, against float32."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32}
    options: dict[str, Any] = {"moe": True, "dtype": torch.bfloat16, "seed": seed}
    folder = write_stock(tmp_path, "text", **(LAYERS | sizes | options))
    peers = [
        wrapped(
            stock(folder, "text", dtype, moe=True), r=4, lora_alpha=6,
            target_modules=list(MODULES), target_parameters=list(STACKS),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]  # fmt: skip
    model = ours(folder, lora=LORA, dtype=torch.bfloat16)
    exact, theirs = (sides(peer, "text") for peer in peers)
    same_adapter(model, exact)
    same_adapter(model, theirs)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 64, generator=generator).bfloat16()
    weights = torch.randn(200, 64, generator=generator).bfloat16()
    for peer, dtype in zip(peers, (torch.float32, torch.bfloat16), strict=True):
        block = peer.base_model.model.model.layers[0].mlp
        (block(x[None].to(dtype))[0] * weights.to(dtype)).float().sum().backward()
    batch = Packed.of([torch.zeros(200, dtype=torch.int64)])
    (model.trunk.layers[0].mlp(x, batch) * weights).float().sum().backward()
    mine, peer_s = [], []
    for stack in STACKS:
        name = f"{ROOT}layers.0.{stack}"
        module = model.lora_layers[name]
        for n, ours_ in enumerate((module.lora_A, module.lora_B)):
            right = exact[name][n].grad
            mine.append(float((ours_.grad - right).norm() / right.norm()))
            peer_s.append(float((theirs[name][n].grad.float() - right).norm() / right.norm()))
    figure(
        f"bf16: gradients of experts' LoRA off by {max(mine):.2%} (PEFT's {max(peer_s):.2%}), "
        f"on average {sum(mine) / 4:.2%} ({sum(peer_s) / 4:.2%})"
    )
    assert sum(mine) <= 1.1 * sum(peer_s)


@pytest.mark.parametrize("r", [1, 3, 8])
def test_ranks_of_experts(base: Bases, r: int) -> None:
    """Rank by group: experts r each, everything else its own."""
    folder = base("text", True, "apart")
    model = ours(folder, lora=LORA, group_r={"experts": r}, group_lora_alpha={"experts": 5})
    peer = wrapped(
        stock(folder, "text", moe=True), r=4, lora_alpha=6, target_modules=list(MODULES),
        target_parameters=list(STACKS), rank_pattern=dict.fromkeys(STACKS, r),
        alpha_pattern=dict.fromkeys(STACKS, 5),
    )  # fmt: skip
    same_adapter(model, sides(peer, "text"))
    docs = documents(LENGTHS)
    off = gap(our_logits(model, docs), stock_logits(peer.eval(), docs))
    effect = gap(our_logits(ours(folder), docs), our_logits(model, docs))
    figure(f"experts of rank {r}: off by {off:.1e} of an effect of {effect:.2f}")
    assert effect > 0.1
    assert off <= 1e-5
