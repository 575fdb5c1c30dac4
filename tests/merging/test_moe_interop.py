"""Adapters of experts across tools: ours under stock PEFT, stock PEFT's in our merge."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.e2e_kit import (
    GATES,
    LENGTHS,
    MOE_STOCK,
    OTHER,
    PREFIX,
    ROOT,
    documents,
    figure,
    loaded_adapter,
    our_logits,
    stock,
    stock_logits,
    wrapped,
    write_stock,
)
from support.moe_kit import canonical, exact, rewrite, tensors_of
from support.tiers import fast, pairs
from torch import Tensor

from qcore.config.settings import Settings
from qcore.errors import UsageError
from qcore.inference.generate import Generator
from qcore.io.artifact import read_manifest
from qcore.merging.merge import merge
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
TRAINED: dict[str, dict[str, Any]] = {
    "default": {},
    "ranks of groups": {"group_r": {"experts": 3, "attn": 5}, "group_lora_alpha": {"experts": 9}},
    "router too": {
        "target_groups": ("attn", "experts", "router", "gdn_gates"), "group_r": {"router": 2},
    },
    "experts alone": {"target_groups": ("experts",)},
    "with the load-balancing loss": {"router_aux_loss_coef": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bf16 base of either class; the vision-language one fused, the text one per expert."""
    found = {}
    for kind, layout in (("vl", "fused"), ("text", "apart")):
        home = tmp_path_factory.mktemp(kind)
        written = write_stock(
            home / "stock", kind, tied=kind == "vl", moe=True, dtype=torch.bfloat16, **LAYERS
        )
        found[kind] = rewrite(written, home / layout, layout)
    return found


def settings(**more: Any) -> Settings:
    options: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "r": 4,
        "lora_alpha": 12, "learning_rate": 5e-2, "dtype": "fp32", "quantization": "none",
        "save_steps": 0,
    }  # fmt: skip
    return Settings(**(options | more))


# -- ours under stock PEFT


@pytest.mark.parametrize(
    ("kind", "recipe"), fast(pairs(["vl", "text"], [*TRAINED]), ("vl", "default"), names=2)
)
def test_trained_by_us_and_loaded_by_stock_peft(
    bases: dict[str, Path], rows: Path, tmp_path: Path, kind: str, recipe: str
) -> None:
    """The adapter is written for `kind`, whichever class the base was saved as."""
    base, out = bases["vl"], tmp_path / "adapter"
    train(str(base), rows, out, settings(adapter_class=kind, **TRAINED[recipe]), device="cpu")
    named = read_manifest(out).meta["adapter_class"]
    assert named == {"name": kind, "classes": list(named["classes"])}
    assert MOE_STOCK[kind].__name__ in named["classes"]
    docs = documents(LENGTHS)
    plain = stock_logits(stock(base, kind, moe=True), docs)
    with warnings.catch_warnings():
        # PEFT only warns when an adapter does not fit.
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        peer = loaded_adapter(stock(base, kind, moe=True), out)
    held = {n for n, _ in peer.named_parameters() if "lora_" in n}
    written = {n.replace(".weight", ".default.weight") for n in tensors_of(out)}
    assert held == written
    theirs = stock_logits(peer, docs)
    mine = our_logits(Generator(str(base), adapter=out, device="cpu", dtype="fp32").model, docs)
    effect = float((theirs - plain).abs().max())
    off = float((mine - theirs).abs().max())
    figure(f"{kind}, {recipe}: differs by {off:.1e} of an effect of {effect:.2f}")
    assert effect > 0.1
    assert off <= 1e-4
    with pytest.raises(ValueError, match="target"):
        loaded_adapter(stock(base, OTHER[kind], moe=True), out)


@pytest.mark.slow
def test_experts_in_another_order_would_show(
    bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    """B by expert instead of by rank: the same shapes, other numbers, and stock PEFT says so."""
    base, out = bases["vl"], tmp_path / "adapter"
    train(str(base), rows, out, settings(target_groups=("experts",)), device="cpu")
    docs = documents(LENGTHS)
    right = stock_logits(loaded_adapter(stock(base, "vl", moe=True), out), docs)
    peer = loaded_adapter(stock(base, "vl", moe=True), out)
    with torch.no_grad():
        for name, b in peer.named_parameters():
            if "lora_B" in name:
                b.copy_(b.view(len(b), 4, 6).transpose(1, 2).reshape(b.shape))
    assert float((stock_logits(peer, docs) - right).abs().max()) > 1e-2


def test_the_config_that_we_write(bases: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    options = TRAINED["ranks of groups"]
    train(str(bases["vl"]), rows, tmp_path / "a", settings(max_steps=1, **options), device="cpu")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    stacks = ("mlp.experts.down_proj", "mlp.experts.gate_up_proj")
    names = [name.removeprefix(f"{ROOT}layers.") for name in config["target_parameters"]]
    assert names == [f"{layer}.{stack}" for layer in range(len(names) // 2) for stack in stacks]
    ranks = {"mlp.experts.down_proj": 3, "mlp.experts.gate_up_proj": 3}
    ranks |= {f"self_attn.{x}_proj": 5 for x in "qkvo"}
    assert config["rank_pattern"] == ranks
    assert config["alpha_pattern"] == dict.fromkeys(
        ("mlp.experts.down_proj", "mlp.experts.gate_up_proj"), 9
    )
    assert config["lora_dropout"] == 0
    stem = f"base_model.model.{ROOT}layers.1.mlp.experts"
    shapes = {
        n: tuple(t.shape) for n, t in load_file(tmp_path / "a/adapter_model.safetensors").items()
    }
    # 6 experts of rank 3; hidden 48, two halves of 24.
    assert shapes[f"{stem}.base_layer.lora_A.weight"] == (18, 48)
    assert shapes[f"{stem}.base_layer.lora_B.weight"] == (48, 18)
    assert shapes[f"{stem}.lora_A.weight"] == (18, 24)
    assert shapes[f"{stem}.lora_B.weight"] == (48, 18)


@pytest.mark.parametrize("groups", [(), ("experts",), ("attn", "router")])
def test_dropout_with_experts_is_refused(
    bases: dict[str, Path], rows: Path, tmp_path: Path, groups: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError, match="dropout") as error:
        train(
            str(bases["vl"]), rows, tmp_path / "a",
            settings(lora_dropout=0.1, target_groups=groups), device="cpu",
        )  # fmt: skip
    assert error.value.code == "QC-LORA-003"
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_dropout_without_experts_is_not(bases: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    train(
        str(bases["vl"]), rows, tmp_path / "a",
        settings(max_steps=1, lora_dropout=0.1, target_groups=("attn", "shared_expert")),
        device="cpu",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        loaded_adapter(stock(bases["vl"], "vl", moe=True), tmp_path / "a")


# -- stock PEFT's in our merge

LINEAR = [
    "q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj", "gate_proj",
    "up_proj", "down_proj",
]  # fmt: skip
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
RECIPES: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": [], "target_parameters": [GATE_UP, DOWN]},
    "the other order": {"target_modules": [], "target_parameters": [DOWN, GATE_UP]},
    "short names": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
    },
    "gate and up alone": {"target_modules": [], "target_parameters": [GATE_UP]},
    "down alone": {"target_modules": ["o_proj"], "target_parameters": [DOWN]},
    "everything": {
        "target_modules": [*LINEAR, *GATES, "shared_expert_gate"],
        "target_parameters": [GATE_UP, DOWN, "mlp.gate.weight"],
    },
    "rslora": {
        "target_modules": LINEAR, "target_parameters": [GATE_UP, DOWN], "use_rslora": True,
        "r": 5, "lora_alpha": 4,
    },
    "patterns": {
        "target_modules": LINEAR, "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {"experts.gate_up_proj": 2, "q_proj": 3, "shared_expert.down_proj": 1},
        "alpha_pattern": {"experts.down_proj": 3, "in_proj_qkv": 11},
    },
    "a pattern that hits both": {
        "target_modules": LINEAR, "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {"down_proj": 2},
    },
    "the shared expert alone": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "the router alone": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
}  # fmt: skip


def made_by_peft(base: Path, kind: str, folder: Path, recipe: dict[str, Any]) -> Any:
    """A stock adapter on the bf16 base, every A and B random, saved by PEFT."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6} | recipe
    model = wrapped(stock(base, kind, torch.bfloat16, moe=True), **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


@pytest.mark.parametrize(
    ("kind", "recipe"),
    fast(pairs(["vl", "text"], [*RECIPES]), *pairs(["vl", "text"], [*RECIPES])[::4], names=2),
)
def test_made_by_stock_peft_and_merged_by_us(
    bases: dict[str, Path], tmp_path: Path, kind: str, recipe: str
) -> None:
    """Per tensor equal to PEFT's own merge, and at least as close to float64."""
    base, adapter, out = bases[kind], tmp_path / "adapter", tmp_path / "merged"
    peer = made_by_peft(base, kind, adapter, RECIPES[recipe])
    truth = exact(base, adapter)
    report = merge(str(base), adapter, out, trust_base=True)
    mine, before = canonical(tensors_of(out)), canonical(tensors_of(base))
    assert report.pairs == len(truth)
    touched = {n for n, value in mine.items() if not torch.equal(value, before[n])}
    assert touched == truth.keys()
    single = loaded_adapter(stock(base, kind, moe=True), adapter)
    worst, off = 0.0, {"ours": [], "PEFT's": []}  # type: ignore[var-annotated]
    theirs, exactly = (
        {name.replace(PREFIX[kind], ROOT, 1): value for name, value in merged.items()}
        for merged in (
            copy.deepcopy(peer).merge_and_unload().state_dict(),
            single.merge_and_unload().state_dict(),
        )
    )
    for name, value in truth.items():
        assert torch.equal(mine[name], value.to(torch.bfloat16)), name
        # In float32 theirs is the same sum; in bfloat16 it rounds what it adds too.
        worst = max(worst, float((exactly[name].double() - value).abs().max()))
        for whose, x in (("ours", mine), ("PEFT's", theirs)):
            assert x[name].dtype == torch.bfloat16
            off[whose].append(float((x[name].double() - value).abs().mean()))
        assert off["ours"][-1] <= off["PEFT's"][-1], name
    for name in mine.keys() & theirs.keys() - truth.keys():
        assert torch.equal(mine[name], theirs[name]), name
    means = {whose: f"{sum(errors) / len(errors):.3e}" for whose, errors in off.items()}
    figure(f"{kind}, {recipe}: {len(truth)} tensors, fp32 {worst:.1e}, mean error in bf16 {means}")
    assert worst <= 1e-5


def test_a_merge_without_scaling_or_of_another_order_would_show(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """`exact` read with B by expert is far from PEFT's merge, so the test above can fail."""
    base, adapter = bases["vl"], tmp_path / "adapter"
    peer = made_by_peft(base, "vl", adapter, RECIPES["experts"])
    theirs = peer.merge_and_unload().state_dict()
    found = load_file(adapter / "adapter_model.safetensors")
    name = f"{ROOT}layers.0.mlp.experts.gate_up_proj"
    stem = f"base_model.model.{name.removesuffix('.gate_up_proj')}.base_layer"
    a, b = (found[f"{stem}.lora_{side}.weight"] for side in "AB")
    wrong: Tensor = torch.stack([b[:, 4 * e : 4 * e + 4] @ a[4 * e : 4 * e + 4] for e in range(6)])
    value = canonical(tensors_of(base))[name].float() + 1.5 * wrong
    assert float((theirs[name].float() - value).abs().max()) > 0.02
    assert float((theirs[name].float() - exact(base, adapter)[name]).abs().max()) < 0.01


def test_stock_peft_s_experts_in_our_model(bases: dict[str, Path], tmp_path: Path) -> None:
    """Read for generation too, not only for a merge."""
    base, adapter = bases["text"], tmp_path / "adapter"
    made_by_peft(base, "text", adapter, RECIPES["everything"])
    docs = documents(LENGTHS)
    theirs = stock_logits(loaded_adapter(stock(base, "text", moe=True), adapter), docs)
    told = Generator(str(base), adapter=adapter, trust_base=True, device="cpu", dtype="fp32")
    off = float((our_logits(told.model, docs) - theirs).abs().max())
    figure(f"stock PEFT's adapter in our model: off by {off:.1e}")
    assert off <= 1e-4
