"""Adapters in the layouts of other trainers: PEFT's own merge of the same values is the judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.change_kit import assert_merged, step, written
from support.e2e_kit import LENGTHS, documents, our_logits, stock_logits, write_stock
from support.model_kit import edit_json
from support.moe_kit import rewrite
from support.tiers import fast
from torch import Tensor

from qcore.adapter.delta import Deltas
from qcore.adapter.evidence import read_for
from qcore.adapter.open import open_adapter
from qcore.adapter.show import show_adapter
from qcore.config.settings import Settings
from qcore.errors import QcoreError
from qcore.inference.generate import Generator
from qcore.merging.against_stock import verify_against_stock
from qcore.merging.combine import combine
from qcore.merging.merge import merge
from qcore.plugins.resolve_model import identify
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
FILE = "adapter_model.safetensors"
Tensors = dict[str, Tensor]
Layout = Callable[[Tensors, Mapping[str, int]], Tensors]
LINEAR: dict[str, Any] = {
    "target_modules": ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "q_proj", "down_proj"]
}
EXPERTS: dict[str, Any] = {
    "target_modules": ["q_proj", "shared_expert.up_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("dense") / "base", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("moe")
    stock = write_stock(home / "stock", moe=True, dtype=torch.bfloat16)
    return {kind: rewrite(stock, home / kind, kind) for kind in ("fused", "apart")}


def sizes(base: Path) -> dict[str, int]:
    text = json.loads((base / "config.json").read_text())["text_config"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    return {"q": keys, "k": keys, "v": values, "experts": text.get("num_experts", 0)}


# -- the layouts, built from PEFT's tensors without code of the project


def split(tensors: Tensors, size: Mapping[str, int]) -> Tensors:
    """q, k and v apart, as Tinker trains them."""
    out = {}
    for name, value in tensors.items():
        if "in_proj_qkv" not in name:
            out[name] = value
            continue
        rows = dict(zip("qkv", value.split([size[x] for x in "qkv"]), strict=True)) if (
            "lora_B" in name or "magnitude" in name
        ) else dict.fromkeys("qkv", value)  # fmt: skip
        out |= {name.replace("_qkv", f"_{x}"): part.clone() for x, part in rows.items()}
    return out


def tinker(tensors: Tensors, size: Mapping[str, int]) -> Tensors:
    """The same with the names of the text class."""
    return {n.replace(".language_model.", "."): v for n, v in split(tensors, size).items()}


def fused(tensors: Tensors, size: Mapping[str, int]) -> Tensors:
    """One module for q, k, v and z, and one for b and a; both matrices A are those of the first."""
    out = {}
    for name, value in tensors.items():
        for first, second, both in (("_qkv.", "_z.", "_qkvz."), ("_b.", "_a.", "_ba.")):
            if first in name:
                other = tensors[name.replace(first, second)]
                whole = value if "lora_A" in name else torch.cat([value, other])
                out[name.replace(first, both)] = whole.clone()
                break
            if second in name:
                break
        else:
            out[name] = value
    return out


def by_expert(tensors: Tensors, r: int, experts: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A ``[E, r, in]`` and B ``[E, out, r]`` of each stack, by the name of the stack."""
    out = {}
    for name, a in tensors.items():
        if "experts" in name and name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            root = name.removesuffix(".lora_A.weight").removesuffix(".base_layer")
            stack = "gate_up_proj" if ".base_layer" in name else "down_proj"
            # PEFT 0.21: A is by expert, B by rank.
            out[f"{root}.{stack}"] = (
                a.view(experts, r, -1), b.view(b.shape[0], r, experts).permute(2, 0, 1),
            )  # fmt: skip
    return out


def stacked(words: Mapping[str, str], *, apart: bool, together: bool = False) -> Layout:
    """Experts in modules of three dimensions, or one module for each expert (`apart`)."""

    def convert(tensors: Tensors, size: Mapping[str, int]) -> Tensors:
        experts = size["experts"]
        out = {name: value for name, value in tensors.items() if "mlp.experts" not in name}
        for name, (a, b) in by_expert(tensors, 4, experts).items():
            root, _, stack = name.rpartition(".")
            half = b.shape[1] // 2
            sides = {"gate_up_proj": b} if together else {
                "gate_proj": b[:, :half], "up_proj": b[:, half:],
            }  # fmt: skip
            for proj, own in (sides if stack == "gate_up_proj" else {"down_proj": b}).items():
                word = words.get(proj, proj)
                for e in range(experts) if apart else ():
                    out[f"{root}.{e}.{word}.lora_A.weight"] = a[e].clone()
                    out[f"{root}.{e}.{word}.lora_B.weight"] = own[e].clone()
                if not apart:
                    out[f"{root}.{word}.lora_A.weight"] = a.clone()
                    out[f"{root}.{word}.lora_B.weight"] = own.clone()
        return out

    return convert


TINKER = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
DENSE: dict[str, Layout] = {
    "q, k, v": split,
    "Tinker": tinker,
    "wrapped": lambda t, size: {
        "_orig_mod." + n.replace(".weight", ".default.weight"): v
        for n, v in tinker(t, size).items()
    },
}
MOE: dict[str, Layout] = {
    "per expert": stacked({}, apart=True),
    "per expert, w1": stacked(TINKER, apart=True),
    "per expert, fused": stacked({}, apart=True, together=True),
    "w1, w2, w3": stacked(TINKER, apart=False),
    "gate, up, down": stacked({}, apart=False),
    "stacked": stacked({}, apart=False, together=True),
    "wrapped": lambda t, size: {
        n.replace("base_model.model.model.language_model.", "module.model._orig_mod."): v
        for n, v in stacked({}, apart=True)(t, size).items()
    },
}


def foreign(adapter: Path, folder: Path, convert: Layout, base: Path, **config: Any) -> Path:
    """The adapter in another layout, whose config names its targets as Tinker's does."""
    shutil.copytree(adapter, folder)
    tensors = convert(load_file(adapter / FILE), sizes(base))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / FILE)
    fields = {"target_modules": "all-linear", "target_parameters": None} | config
    edit_json(folder / "adapter_config.json", lambda c: c.update(fields))
    return folder


@pytest.mark.parametrize(
    ("layout", "kind"),
    fast(product(DENSE, ["LoRA", "DoRA"]), ("Tinker", "LoRA"), ("wrapped", "DoRA"), names=2),
)
def test_split_projections(dense: Path, tmp_path: Path, layout: str, kind: str) -> None:
    peer = written(dense, tmp_path / "peft", LINEAR | {"use_dora": kind == "DoRA"})
    adapter = foreign(tmp_path / "peft", tmp_path / "a", DENSE[layout], dense)
    report = merge(str(dense), adapter, tmp_path / "out", trust_base=True)
    assert report.proof is not None
    assert report.proof["effect"] > 0.1
    assert len(assert_merged(peer, dense, tmp_path / "out")) == report.pairs


def test_fused_projections(dense: Path, tmp_path: Path) -> None:
    def share(model: Any) -> None:
        """One A for both modules, which a fused module has."""
        for layer in model.base_model.model.model.language_model.layers:
            block = getattr(layer, "linear_attn", None)
            for first, second in (("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")):
                if block is not None:
                    a = getattr(block, first).lora_A["default"].weight.data
                    getattr(block, second).lora_A["default"].weight.data = a.clone()

    peer = written(dense, tmp_path / "peft", LINEAR, edit=share)
    adapter = foreign(tmp_path / "peft", tmp_path / "a", fused, dense)
    report = merge(str(dense), adapter, tmp_path / "out", trust_base=True)
    assert report.proof is not None
    assert len(assert_merged(peer, dense, tmp_path / "out")) == report.pairs


@pytest.mark.parametrize(
    ("layout", "kind"),
    fast(
        product(MOE, ["fused", "apart"]),
        ("per expert", "fused"), ("w1, w2, w3", "apart"), ("stacked", "fused"), names=2,
    ),
)  # fmt: skip
def test_experts(moe: dict[str, Path], tmp_path: Path, layout: str, kind: str) -> None:
    base = moe[kind]
    peer = written(moe["fused"], tmp_path / "peft", EXPERTS, moe=True)
    adapter = foreign(tmp_path / "peft", tmp_path / "a", MOE[layout], base)
    report = merge(str(base), adapter, tmp_path / "out", trust_base=True)
    assert report.proof is not None
    assert report.proof["effect"] > 0.1
    if kind == "apart":  # compared with the merge of the fused base, which PEFT's is
        out = rewrite(tmp_path / "out", tmp_path / "fused", "fused")
    else:
        out = tmp_path / "out"
    assert len(assert_merged(peer, moe["fused"], out)) == report.pairs


# -- what they cannot be read as


def dropped(*ends: str) -> Layout:
    """Per-expert modules without those whose names end so."""
    return lambda tensors, size: {
        name: value
        for name, value in stacked({}, apart=True)(tensors, size).items()
        if not name.endswith(ends)
    }


def twice(tensors: Tensors, size: Mapping[str, int]) -> Tensors:
    return tensors | split(tensors, size)


def short(tensors: Tensors, size: Mapping[str, int]) -> Tensors:
    """v of q, k and v without its last row."""
    return {
        name: value[:-1] if name.endswith("in_proj_v.lora_B.weight") else value
        for name, value in split(tensors, size).items()
    }


def cut(tensors: Tensors, size: Mapping[str, int]) -> Tensors:
    """in_proj_ba without its last row: no rows are left out silently."""
    return {
        name: value[:-1] if name.endswith("in_proj_ba.lora_B.weight") else value
        for name, value in fused(tensors, size).items()
    }


FAULTS: dict[str, tuple[Layout, str, str]] = {
    "an expert": (
        dropped("experts.3.up_proj.lora_A.weight", "experts.3.up_proj.lora_B.weight"),
        "QC-ADAPTER-006", "experts.3.up_proj.lora_A.weight",
    ),
    "a side of an expert": (
        dropped("experts.3.up_proj.lora_B.weight"),
        "QC-ADAPTER-006", "experts.3.up_proj.lora_B.weight",
    ),
    "twice": (twice, "QC-ADAPTER-005", "in_proj_qkv.lora_A.weight"),
    "short": (short, "QC-ADAPTER-007", "in_proj_v.lora_B.weight"),
    "cut": (cut, "QC-ADAPTER-007", "in_proj_ba.lora_B.weight"),
    "a fourth expert more": (
        lambda t, s: stacked({}, apart=True)(t, s) | {
            name.replace("experts.0.", "experts.99."): value
            for name, value in stacked({}, apart=True)(t, s).items() if "experts.0." in name
        },
        "QC-ADAPTER-005", "experts.99.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_or_left_over_is_named(
    dense: Path, moe: dict[str, Path], tmp_path: Path, fault: str
) -> None:
    convert, code, field = FAULTS[fault]
    is_moe = "expert" in fault
    base = moe["fused"] if is_moe else dense
    written(base, tmp_path / "peft", EXPERTS if is_moe else LINEAR, moe=is_moe)
    adapter = foreign(tmp_path / "peft", tmp_path / "a", convert, base)
    with pytest.raises(QcoreError) as caught:
        read_for(identify(str(base)), adapter, trust_base=True)
    errors = [caught.value, *getattr(caught.value, "others", ())]
    assert any(e.code == code and field in str(e.field) for e in errors), str(caught.value)


def test_ranks_by_module_and_declared_targets(dense: Path, tmp_path: Path) -> None:
    """A rank of one part, and a list of targets that names the parts."""
    peer = written(dense, tmp_path / "peft", LINEAR | {"rank_pattern": {"in_proj_qkv": 6}})
    adapter = foreign(
        tmp_path / "peft", tmp_path / "a", split, dense,
        rank_pattern={r".*in_proj_[qkv]": 6},
        target_modules=["in_proj_q", "in_proj_k", "in_proj_v", *LINEAR["target_modules"][1:]],
    )  # fmt: skip
    merge(str(dense), adapter, tmp_path / "out", trust_base=True, prove=False)
    assert_merged(peer, dense, tmp_path / "out")


def test_targets_of_experts_that_a_shared_expert_shares(
    moe: dict[str, Path], tmp_path: Path
) -> None:
    """`down_proj` names the routed experts' modules; the shared one has no tensors: a warning."""
    written(moe["fused"], tmp_path / "peft", EXPERTS, moe=True)
    adapter = foreign(
        tmp_path / "peft", tmp_path / "a", stacked({}, apart=True), moe["fused"],
        target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    read = read_for(identify(str(moe["fused"])), adapter, trust_base=True)
    assert any("shared_expert.down_proj has no tensors" in note for note in read.notes)


def test_a_matrix_that_experts_share_is_held_once(moe: dict[str, Path], tmp_path: Path) -> None:
    """Tinker's A of w1 is ``[1, r, in]``: memory does not grow with the number of experts."""

    def share(tensors: Tensors, size: Mapping[str, int]) -> Tensors:
        return {
            name: value[:1] if name.endswith(("w1.lora_A.weight", "w2.lora_B.weight")) else value
            for name, value in MOE["w1, w2, w3"](tensors, size).items()
        }

    base = moe["fused"]
    written(base, tmp_path / "peft", EXPERTS, moe=True)
    adapter = foreign(tmp_path / "peft", tmp_path / "a", share, base)
    merge(str(base), adapter, tmp_path / "out", trust_base=True)
    tensors = load_file(adapter / FILE)
    after, before = (load_file(path / "model.safetensors") for path in (tmp_path / "out", base))
    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    root = "model.language_model.layers.1.mlp.experts"
    half = {
        word: (tensors[f"base_model.model.{root}.{word}.lora_B.weight"]
               @ tensors[f"base_model.model.{root}.{word}.lora_A.weight"]) for word in ("w1", "w3")
    }  # fmt: skip
    name = f"{root}.gate_up_proj"
    wanted = before[name].float() + scaling * torch.cat([half["w1"], half["w3"]], dim=1)
    assert bool(((after[name].float() - wanted).abs() <= step(wanted)).all())
    read = read_for(identify(str(base)), adapter, trust_base=True)
    held = sum(value.numel() for value in Deltas(read)._values.values())
    assert held == sum(value.numel() for value in tensors.values())


# -- the other verbs


@pytest.mark.parametrize("layout", fast(DENSE, "Tinker"))
def test_generate_computes_what_peft_computes(dense: Path, tmp_path: Path, layout: str) -> None:
    peer = written(dense, tmp_path / "peft", LINEAR)
    adapter = foreign(tmp_path / "peft", tmp_path / "a", DENSE[layout], dense)
    docs = documents(LENGTHS)
    model = Generator(
        str(dense), adapter=adapter, trust_base=True, device="cpu", dtype="fp32"
    ).model
    assert float((our_logits(model, docs) - stock_logits(peer, docs)).abs().max()) <= 1e-4


def test_open_adapter_has_the_deltas(moe: dict[str, Path], tmp_path: Path) -> None:
    written(moe["fused"], tmp_path / "peft", EXPERTS, moe=True)
    plain = open_adapter(tmp_path / "peft", moe["fused"], trust_base=True)
    for name, convert in MOE.items():
        adapter = foreign(tmp_path / "peft", tmp_path / name, convert, moe["fused"])
        opened = open_adapter(adapter, moe["fused"], trust_base=True)
        assert opened.keys() == plain.keys()
        for weight, delta in opened.items():
            mine, theirs = delta.dense(), plain[weight].dense()
            assert float((mine - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max()), name


@pytest.mark.parametrize("kind", fast(["q, k, v", "per expert", "stacked"], "q, k, v"))
def test_training_goes_on_from_it(
    dense: Path, moe: dict[str, Path], rows: Path, tmp_path: Path, kind: str
) -> None:
    """With next to no learning rate, one step leaves the deltas as they are."""
    is_moe = kind not in DENSE
    base = moe["fused"] if is_moe else dense
    recipe = EXPERTS if is_moe else {"target_modules": ["in_proj_qkv", "in_proj_z", "out_proj"]}
    written(
        base, tmp_path / "peft", recipe | ({"target_modules": []} if is_moe else {}), moe=is_moe
    )
    adapter = foreign(tmp_path / "peft", tmp_path / "a", (DENSE | MOE)[kind], base)
    settings = Settings(
        max_steps=1, quantization="none", dtype="fp32", save_steps=0, learning_rate=1e-8,
        per_device_train_batch_size=2, gradient_accumulation_steps=1, gradient_checkpointing=False,
        publish_without_gain=True,
    )  # fmt: skip
    train(
        str(base), rows, tmp_path / "out", settings, device="cpu", init_adapter=adapter,
        trust_base=True,
    )  # fmt: skip
    before = open_adapter(adapter, base, trust_base=True)
    after = open_adapter(tmp_path / "out", base)
    assert before.keys() == after.keys()
    for name, delta in before.items():
        mine, theirs = after[name].dense(), delta.dense()
        assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max()), name


def test_show_and_stock_verification(dense: Path, tmp_path: Path) -> None:
    """`adapter show` counts the parts; stock PEFT cannot judge them, and combine is the way."""
    written(dense, tmp_path / "peft", LINEAR)
    adapter = foreign(tmp_path / "peft", tmp_path / "a", split, dense)
    report = show_adapter(adapter, model=str(dense), norms=True)
    assert report.fit is not None
    assert report.fit.unmatched == ()
    assert {r for targets in report.targets for r in targets.ranks} == {4}
    with pytest.raises(QcoreError) as caught:
        verify_against_stock(adapter, model=str(dense))
    assert caught.value.code == "QC-STOCK-004"
    assert "adapter combine" in (caught.value.fix or "")
    combine({str(adapter): 1.0}, tmp_path / "peft2", model=str(dense))
    first, second = (
        open_adapter(tmp_path / name, dense, trust_base=True) for name in ("peft", "peft2")
    )
    for name, delta in first.items():
        assert torch.allclose(second[name].dense(), delta.dense(), atol=1e-6)
