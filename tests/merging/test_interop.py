"""Adapters across tools: ours under stock PEFT, stock PEFT's in our merge."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.e2e_kit import (
    GATES,
    LENGTHS,
    LINEARS,
    OTHER,
    PREFIX,
    ROOT,
    STOCK,
    documents,
    figure,
    loaded_adapter,
    our_logits,
    stock,
    stock_logits,
    wrapped,
    write_stock,
)
from support.tiers import pairs
from torch import Tensor

from qcore.config.settings import Settings
from qcore.errors import TrustError
from qcore.inference.generate import Generator
from qcore.io.artifact import read_manifest
from qcore.merging.merge import merge
from qcore.training.train import train


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bf16 base of either class."""
    return {
        kind: write_stock(
            tmp_path_factory.mktemp(kind), kind, tied=kind == "vl", dtype=torch.bfloat16
        )
        for kind in STOCK
    }


# -- ours under stock PEFT


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        pytest.param("vl", (), id="vl-all ten"),
        pytest.param("text", ("attn", "gdn_gates"), id="text-two groups", marks=pytest.mark.slow),
    ],
)
def test_trained_by_us_and_loaded_by_stock_peft(
    bases: dict[str, Path], rows: Path, tmp_path: Path, kind: str, groups: tuple[str, ...]
) -> None:
    """The adapter is written for `kind`, whichever class the base was saved as."""
    base, out = bases["vl"], tmp_path / "adapter"
    settings = Settings(
        max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=1, r=4,
        lora_alpha=12, learning_rate=2e-2, dtype="fp32", quantization="none", save_steps=0,
        gradient_checkpointing=False, adapter_class=kind, target_groups=groups,
    )  # fmt: skip
    train(str(base), rows, out, settings, device="cpu")
    named = read_manifest(out).meta["adapter_class"]
    assert named == {"name": kind, "classes": [STOCK[kind].__name__]}
    docs = documents(LENGTHS)
    plain = stock_logits(stock(base, kind), docs)
    with warnings.catch_warnings():
        # PEFT only warns when an adapter does not fit.
        warnings.filterwarnings("error", message=".*missing adapter keys")
        peer = loaded_adapter(stock(base, kind), out)
    theirs = stock_logits(peer, docs)
    mine = our_logits(Generator(str(base), adapter=out, device="cpu", dtype="fp32").model, docs)
    effect = float((theirs - plain).abs().max())
    gap = float((mine - theirs).abs().max())
    figure(f"{kind} {groups}: differs by {gap:.1e} of an effect of {effect:.2f}")
    assert effect > 0.1
    assert gap <= 1e-4

    # Under the other class the modules have another path. PEFT would only warn about tensors, but
    # it raises where no target is found.
    with pytest.raises(ValueError, match="Target modules"):
        loaded_adapter(stock(base, OTHER[kind]), out)


def test_the_class_is_that_of_the_checkpoint_by_default(
    bases: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    for kind, base in bases.items():
        settings = Settings(max_steps=1, r=2, save_steps=0, dtype="fp32")
        report = train(str(base), rows, tmp_path / kind, settings, device="cpu")
        assert report.adapter_class == kind
        names = load_file(tmp_path / kind / "adapter_model.safetensors")
        assert all(name.startswith(f"base_model.model.{PREFIX[kind]}layers.") for name in names)


# -- stock PEFT's in our merge

ALL = list(LINEARS)
RECIPES: dict[str, dict[str, Any]] = {
    "two names": {"target_modules": ["q_proj", "v_proj"]},
    "all ten": {"target_modules": ALL},
    "gates too": {"target_modules": [*ALL, *GATES]},
    "rslora": {"target_modules": ALL, "use_rslora": True, "r": 8, "lora_alpha": 4},
    "patterns": {
        "target_modules": ALL, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 9},
        "alpha_pattern": {"down_proj": 3, "in_proj_qkv": 11},
    },
    "some layers": {"target_modules": ["gate_proj", "out_proj"], "layers_to_transform": [0, 2]},
    "an expression": {"target_modules": r".*layers\.\d+\.(mlp|self_attn)\.(up|k|o)_proj"},
}  # fmt: skip


def made_by_peft(base: Path, kind: str, folder: Path, recipe: dict[str, Any]) -> Any:
    """A stock adapter on the bf16 base, every A and B random, saved by PEFT."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6} | recipe
    model = wrapped(stock(base, kind, torch.bfloat16), **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return model


def scaling(config: dict[str, Any], module: str) -> float:
    """PEFT's rule, by hand: a pattern matches the end of a path; lora_alpha / r or / sqrt r."""

    def of(pattern: str, default: float) -> float:
        for key, value in config[pattern].items():
            if re.match(rf"(.*\.)?({key})$", module):
                return float(value)
        return default

    r = of("rank_pattern", config["r"])
    return of("alpha_pattern", config["lora_alpha"]) / (r**0.5 if config["use_rslora"] else r)


def exact(base: Path, adapter: Path, kind: str) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, W + scaling B A in float64) of every weight that the adapter names."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors, weights = load_file(adapter / "adapter_model.safetensors"), on_disk(base)
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            canonical = f"{ROOT}{module.removeprefix(PREFIX[kind])}.weight"
            delta = b.double() @ a.double() * scaling(config, module)
            yield canonical, weights[canonical].double() + delta


def on_disk(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its canonical name."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    flat = not any(name.startswith(ROOT) for name in found)
    return {
        ROOT + name.removeprefix("model.") if flat and name.startswith("model.") else name: value
        for name, value in found.items()
    }


@pytest.mark.parametrize(("kind", "recipe"), pairs(["vl", "text"], [*RECIPES]))
def test_made_by_stock_peft_and_merged_by_us(
    bases: dict[str, Path], tmp_path: Path, kind: str, recipe: str
) -> None:
    base, adapter, out = bases[kind], tmp_path / "adapter", tmp_path / "merged"
    peer = made_by_peft(base, kind, adapter, RECIPES[recipe])
    truth = dict(exact(base, adapter, kind))
    assert truth
    report = merge(str(base), adapter, out, trust_base=True)
    assert report.pairs == report.changed == len(truth)
    mine = on_disk(out)
    errors = {}
    # By default PEFT adds a float32 delta and rounds the sum; its safe merge rounds the delta too.
    for safe in (True, False):
        merged = copy.deepcopy(peer).merge_and_unload(safe_merge=safe).state_dict()
        theirs = {name.replace(PREFIX[kind], ROOT, 1): value for name, value in merged.items()}
        for name, value in truth.items():
            assert mine[name].dtype == theirs[name].dtype == torch.bfloat16
            our, their = ((x[name].double() - value).abs() for x in (mine, theirs))
            assert float(our.max()) <= float(their.max()), name
            assert float(our.mean()) <= float(their.mean()), name
        errors[safe] = mean_error(theirs, truth)
    ours = mean_error(mine, truth)
    figure(
        f"{kind}, {recipe}: {len(truth)} tensors, mean error {ours:.4e}, "
        f"PEFT's {errors[False]:.4e}, safe {errors[True]:.4e}"
    )
    assert ours < errors[True]
    untouched = on_disk(base).keys() - truth.keys()
    before = on_disk(base)
    assert all(torch.equal(mine[name], before[name]) for name in untouched)


def mean_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Mean over tensors of the mean absolute error."""
    errors = [float((found[name].double() - value).abs().mean()) for name, value in truth.items()]
    return sum(errors) / len(errors)


def test_an_adapter_of_one_class_merges_into_a_base_of_the_other(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """The same weights saved as the vision-language class; the adapter is of the text class."""
    base, adapter = bases["vl"], tmp_path / "adapter"
    made_by_peft(base, "text", adapter, RECIPES["all ten"])
    names = load_file(adapter / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    merge(str(base), adapter, tmp_path / "merged", trust_base=True)
    mine = on_disk(tmp_path / "merged")
    for name, value in exact(base, adapter, "text"):
        assert (
            torch.equal(mine[name], value.to(torch.bfloat16))
            or ((mine[name].double() - value).abs() <= (value.abs() * 2**-8).clamp_min(1e-9)).all()
        )


@pytest.mark.parametrize("kind", ["text", "vl"])
def test_without_consent_nothing_is_merged(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    made_by_peft(bases[kind], kind, tmp_path / "adapter", RECIPES["two names"])
    with pytest.raises(TrustError, match="fingerprint") as error:
        merge(str(bases[kind]), tmp_path / "adapter", tmp_path / "merged")
    assert (error.value.code, error.value.exit_code) == ("QC-ADAPTER-009", 77)
    assert error.value.fix is not None
    assert "--trust-base" in error.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    shutil.rmtree(tmp_path / "adapter")
