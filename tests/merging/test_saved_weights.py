"""Heads, embeddings, saved modules and token rows of an adapter, merged as stock PEFT uses them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.change_kit import assert_merged, on_disk, written
from support.e2e_kit import LENGTHS, documents, our_logits, stock, stock_logits, write_stock
from support.model_kit import edit_json
from support.tiers import fast

from qcore.errors import QcoreError
from qcore.inference.generate import Generator
from qcore.merging.against_stock import verify_against_stock
from qcore.merging.merge import merge
from qcore.plugins.resolve_model import identify

pytestmark = pytest.mark.usefixtures("one_thread")
Q = {"target_modules": ["q_proj"]}
HEAD, EMBED, ROWS = "lm_head", "embed_tokens", "trainable_token_indices"
CANONICAL = "model.language_model"
#: What two wrappers of PEFT call the values below them.
BASES = (".base_layer.weight", ".token_adapter.base_layer.weight")
MERGED: dict[str, dict[str, Any]] = {
    "LoRA on the head": {"target_modules": ["q_proj", HEAD]},
    "LoRA on the embedding": {"target_modules": ["q_proj", EMBED]},
    "LoRA on both, in patterns": {
        "target_modules": ["q_proj", EMBED, HEAD], "rank_pattern": {HEAD: 2},
        "alpha_pattern": {EMBED: 3}, "use_rslora": True,
    },
    "DoRA on the head": {"target_modules": ["q_proj", HEAD], "use_dora": True},
    "LoRA on the head alone": {"target_modules": [HEAD]},
    "saved embedding and head": {**Q, "modules_to_save": [EMBED, HEAD]},
    "saved head": {**Q, "modules_to_save": [HEAD]},
    "saved embedding": {**Q, "modules_to_save": [EMBED]},
    "saved norms and conv1d": {**Q, "modules_to_save": ["input_layernorm", "conv1d", "q_norm"]},
    "saved last norm": {**Q, "modules_to_save": ["language_model.norm"]},
    "saved mixers": {**Q, "modules_to_save": ["linear_attn"]},
    "rows": {**Q, ROWS: [3, 5]},
    "rows by module": {**Q, ROWS: {EMBED: [5, 3]}},
    "rows of both": {**Q, ROWS: {EMBED: [3, 5], HEAD: [7, 3, 9]}},
    "rows of the head": {**Q, ROWS: {HEAD: [7, 3, 9]}},
    "rows and LoRA on the head": {"target_modules": ["q_proj", HEAD], ROWS: {EMBED: [3, 5]}},
}  # fmt: skip
#: Recipes under which PEFT uses one weight for embedding and head, if the base ties them.
TIED = ("saved norms and conv1d", "saved last norm", "saved mixers", "rows", "rows by module")
#: Recipes under ``ensure_weight_tying``: both get the same change.
ENSURED: dict[str, dict[str, Any]] = {
    "LoRA on the embedding": {"target_modules": ["q_proj", EMBED]},
    "LoRA on the head": {"target_modules": ["q_proj", HEAD]},
    "saved embedding": {**Q, "modules_to_save": [EMBED]},
    "rows of both": {**Q, ROWS: {EMBED: [3, 5], HEAD: [3, 5]}},
}
#: The fast tier has one case of each kind.
FAST = (
    ("LoRA on the head", True), ("LoRA on the embedding", False), ("saved embedding", True),
    ("saved norms and conv1d", False), ("rows", True), ("rows of both", False),
)  # fmt: skip
CASES = [
    pytest.param(name, tied, marks=() if (name, tied) in FAST else pytest.mark.slow)
    for name in MERGED
    for tied in (False, True)
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A bf16 base by whether its head is tied."""
    return {
        tied: write_stock(tmp_path_factory.mktemp("base"), tied=tied, dtype=torch.bfloat16)
        for tied in (False, True)
    }


@pytest.mark.parametrize(("recipe", "tied"), CASES)
def test_the_merge_computes_what_peft_computes(
    bases: dict[bool, Path], tmp_path: Path, recipe: str, tied: bool
) -> None:
    peer = written(bases[tied], tmp_path / "a", MERGED[recipe])
    report = merge(str(bases[tied]), tmp_path / "a", tmp_path / "out", trust_base=True)
    untied = tied and recipe not in TIED
    changed = assert_merged(peer, bases[tied], tmp_path / "out", untied=untied)
    assert len(changed) == report.changed == report.pairs + report.replaced
    assert report.proof is not None
    assert report.proof["effect"] > 0.01
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for section in (config, config["text_config"]):
        assert section["tie_word_embeddings"] is (tied and not untied)


@pytest.mark.parametrize("recipe", ENSURED)
def test_a_tied_head_stays_tied_if_both_change_alike(
    bases: dict[bool, Path], tmp_path: Path, recipe: str
) -> None:
    options = ENSURED[recipe] | {"ensure_weight_tying": True}
    peer = written(bases[True], tmp_path / "a", options)
    report = merge(str(bases[True]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert len(assert_merged(peer, bases[True], tmp_path / "out")) == report.changed


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["LoRA on the head", "saved embedding", "rows of both"])
def test_stock_loads_an_untied_merge(tmp_path: Path, recipe: str) -> None:
    """A float32 base, so that logits show no rounding."""
    base = write_stock(tmp_path / "base", tied=True, shard="100KB")
    peer = written(base, tmp_path / "a", MERGED[recipe])
    merge(str(base), tmp_path / "a", tmp_path / "out", trust_base=True)
    docs = documents(LENGTHS)
    theirs = stock_logits(peer, docs)
    again = stock_logits(stock(tmp_path / "out", "vl").eval(), docs)
    assert float((again - theirs).abs().max()) <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recipe", ["rows and LoRA on the head", "LoRA on the embedding"])
def test_generate_computes_what_peft_computes(
    bases: dict[bool, Path], tmp_path: Path, recipe: str, tied: bool
) -> None:
    peer = written(bases[tied], tmp_path / "a", MERGED[recipe])
    docs = documents(LENGTHS)
    generator = Generator(
        str(bases[tied]), adapter=tmp_path / "a", trust_base=True, device="cpu", dtype="fp32"
    )
    gap = (our_logits(generator.model, docs) - stock_logits(peer, docs)).abs().max()
    assert float(gap) <= 1e-4


def test_a_tied_head_that_is_on_disk_too_gets_the_change_of_the_embedding(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    """Some programs save both; a head with the values of the base would be refused."""
    base = shutil.copytree(bases[True], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    peer = written(bases[True], tmp_path / "a", MERGED["rows"])
    merge(str(base), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert "lm_head.weight" in assert_merged(peer, base, tmp_path / "out")
    assert identify(str(tmp_path / "out")).problems == ()


@pytest.mark.parametrize("tied", [False, True])
def test_saved_embeddings_that_equal_the_base_are_ignored(
    bases: dict[bool, Path], tmp_path: Path, tied: bool
) -> None:
    """PEFT saves them in float32, as it held the bf16 base."""
    peer = written(bases[tied], tmp_path / "a", Q, save={"save_embedding_layers": True})
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any("embed_tokens" in name for name in names)
    report = merge(str(bases[tied]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert any("is ignored" in line for line in report.warnings)
    assert assert_merged(peer, bases[tied], tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
def test_added_rows_merge_into_a_base_that_has_them(
    bases: dict[bool, Path], tmp_path: Path, tied: bool
) -> None:
    model = stock(bases[tied], "vl", torch.float32)
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + 2)
    resized = tmp_path / "resized"
    model.to(torch.bfloat16).save_pretrained(resized)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(bases[tied] / name, resized / name)
    peer = written(resized, tmp_path / "a", Q | {"modules_to_save": ["embed_tokens", "lm_head"]})
    with pytest.raises(QcoreError, match="2 rows that") as caught:
        merge(str(bases[tied]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert "name the resized model" in str(caught.value.fix)
    merge(str(resized), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert len(assert_merged(peer, resized, tmp_path / "out", untied=tied)) == 3


@pytest.mark.slow
def test_dora_on_the_embedding_is_refused_and_merges_as_the_fix_says(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    """A tied base is untied first: then PEFT's merge computes what the adapter computes."""
    recipe = {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}
    peer = written(bases[True], tmp_path / "a", recipe)
    with pytest.raises(QcoreError, match="DoRA over the columns") as caught:
        merge(str(bases[True]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert caught.value.code == "QC-ADAPTER-005"
    assert "tie_word_embeddings to false" in str(caught.value.fix)
    untied = shutil.copytree(bases[True], tmp_path / "untied")
    weights = load_file(untied / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    save_file(weights, untied / "model.safetensors", metadata={"format": "pt"})
    edit_json(untied / "config.json", lambda c: c.update(tie_word_embeddings=False))
    edit_json(untied / "config.json", lambda c: c["text_config"].update(tie_word_embeddings=False))
    loaded = peft.PeftModel.from_pretrained(stock(untied, "vl", torch.float32), str(tmp_path / "a"))
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    docs = documents(LENGTHS)
    again = stock_logits(stock(tmp_path / "merged", "vl").eval(), docs)
    assert float((again - stock_logits(peer, docs)).abs().max()) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", [(), ("embed_tokens",), ("lm_head",)])
def test_a_copy_that_no_field_names_replaces_the_weight_itself(
    bases: dict[bool, Path], tmp_path: Path, tied: bool, target: tuple[str, ...]
) -> None:
    """``save_embedding_layers`` leaves such copies; PEFT loads them into the base, LoRA on top."""
    written(bases[tied], tmp_path / "a", {"target_modules": ["q_proj", *target]},
            save={"save_embedding_layers": True})  # fmt: skip
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    copies = [n for n in tensors if n.endswith(".weight") and "lora" not in n]
    noise = 0.05 * torch.randn(tensors[copies[0]].shape, generator=torch.Generator().manual_seed(4))
    for name in copies:  # of a tied base, one weight under both names
        tensors[name] += noise if tied or "embed_tokens" in name else -noise
    save_file(tensors, file)
    loaded = peft.PeftModel.from_pretrained(
        stock(bases[tied], "vl", torch.float32), str(tmp_path / "a")
    ).eval()
    report = merge(str(bases[tied]), tmp_path / "a", tmp_path / "out", trust_base=True)
    changed = assert_merged(loaded, bases[tied], tmp_path / "out", untied=tied and bool(target))
    assert len(changed) == report.changed


@pytest.mark.parametrize("whole", fast([False, True], False))
@pytest.mark.parametrize(
    "recipe",
    fast(
        ["rows", "rows and LoRA on the head", "saved embedding", "saved head", "saved last norm",
         "saved norms and conv1d", "DoRA on the head"],
        "rows and LoRA on the head",
    ),
)  # fmt: skip
def test_verify_against_stock_agrees(
    bases: dict[bool, Path], tmp_path: Path, recipe: str, whole: bool
) -> None:
    """With the stock model as a whole, and with one layer of it in memory at a time."""
    written(bases[True], tmp_path / "a", MERGED[recipe])
    report = verify_against_stock(tmp_path / "a", model=str(bases[True]), whole=whole)
    assert report.problems == ()
    assert all(prompt.effect is not None and prompt.effect > 0.01 for prompt in report.prompts)


@pytest.mark.slow
def test_saved_modules_of_experts_and_of_the_merger(tmp_path: Path) -> None:
    """Stacks of experts, the router, and a module of the tower."""
    base = write_stock(tmp_path / "base", moe=True, dtype=torch.bfloat16)
    saved = ["layers.1.mlp", "merger", "patch_embed"]
    written(base, tmp_path / "a", Q | {"modules_to_save": saved}, moe=True)
    report = merge(str(base), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert report.proof is not None
    assert report.proof["tower_effect"] > 0.01
    before, after = on_disk(base), on_disk(tmp_path / "out")
    values = {
        name.removeprefix("base_model.model."): value
        for name, value in load_file(tmp_path / "a" / "adapter_model.safetensors").items()
        if "lora" not in name
    }
    own = {name: value for name, value in values.items() if name in before}
    assert all(torch.equal(after[name], own[name].bfloat16()) for name in own)
    fused = next(value for name, value in values.items() if name.endswith("experts.down_proj"))
    prefix = "model.language_model.layers.1.mlp.experts"
    for expert, value in enumerate(fused):
        assert torch.equal(after[f"{prefix}.{expert}.down_proj.weight"], value.bfloat16())
    assert report.replaced == len(values)


def test_a_saved_module_of_a_part_that_the_base_lacks_is_refused(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    written(bases[False], tmp_path / "a", Q | {"modules_to_save": ["merger"]})
    text = shutil.copytree(bases[False], tmp_path / "text")
    tensors = load_file(text / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".visual." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, text / "model.safetensors", {"format": "pt"})
    with pytest.raises(QcoreError, match="in a part that qcore does not run") as caught:
        merge(str(text), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert caught.value.code == "QC-ADAPTER-005"


#: Names of other programs: recipe, and what each name contains in place of PEFT's.
RENAMED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "modules of a state dict": (
        {**Q, "modules_to_save": [EMBED, HEAD, "input_layernorm"]},
        {f"{n}.weight": f"{n}.modules_to_save.default.weight"
         for n in (EMBED, HEAD, "input_layernorm")},
    ),
    "embedding of a state dict": (
        {"target_modules": ["q_proj", EMBED]},
        {f"lora_embedding_{s}": f"lora_embedding_{s}.default" for s in "AB"},
    ),
    "DoRA of a state dict": (
        {"target_modules": ["q_proj", HEAD], "use_dora": True},
        {"lora_magnitude_vector": "lora_magnitude_vector.default.weight"},
    ),
    "rows of a state dict": (
        {**Q, ROWS: [3, 5]}, {"trainable_tokens_delta": "trainable_tokens_delta.default"},
    ),
    "head of Tinker": (
        {"target_modules": ["q_proj", HEAD]}, {"model.lm_head.": "model.model.unembed_tokens."},
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", fast([*RENAMED], "head of Tinker", "modules of a state dict"))
def test_names_of_other_programs(bases: dict[bool, Path], tmp_path: Path, recipe: str) -> None:
    options, names = RENAMED[recipe]
    peer = written(bases[False], tmp_path / "a", options)
    file = tmp_path / "a" / "adapter_model.safetensors"
    renamed = {}
    for name, value in load_file(file).items():
        old = next((old for old in names if old in name and "lora_" + old not in name), "")
        renamed[name.replace(old, names[old]) if old else name] = value
    save_file(renamed, file)
    merge(str(bases[False]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert_merged(peer, bases[False], tmp_path / "out")


def test_experts_in_automodels_own_layout_are_refused_by_name(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    written(bases[False], tmp_path / "a", Q)
    file = tmp_path / "a" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.mlp.experts.lora_gate_and_up_A"
    save_file(load_file(file) | {name: torch.zeros(6, 48, 4)}, file)
    with pytest.raises(QcoreError, match="Automodel's own layout") as caught:
        merge(str(bases[False]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert caught.value.code == "QC-ADAPTER-005"


def test_two_spellings_of_trained_rows_are_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    written(bases[False], tmp_path / "a", {**Q, ROWS: [3, 5]})
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors, end = load_file(file), ".token_adapter.trainable_tokens_delta"
    name = next(name for name in tensors if name.endswith(end))
    other = f"{name.removesuffix(end)}.trainable_tokens_delta"
    save_file({**tensors, other: tensors[name] + 1}, file)
    with pytest.raises(QcoreError, match="second tensor") as caught:
        merge(str(bases[False]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert caught.value.code == "QC-ADAPTER-005"
    assert all(spelled in caught.value.message for spelled in (name, other))
    assert not (tmp_path / "out").exists()


def test_a_second_copy_with_the_values_of_the_base_is_ignored(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    peer = written(bases[False], tmp_path / "a", {"target_modules": ["q_proj", EMBED]})
    file = tmp_path / "a" / "adapter_model.safetensors"
    root = next(name for name in load_file(file) if name.endswith("lora_embedding_A"))
    root = root.removesuffix(".lora_embedding_A")
    values = on_disk(bases[False])[f"{CANONICAL}.{EMBED}.weight"]
    saved = {f"{root}{end}": values.clone() for end in BASES}
    save_file(load_file(file) | saved, file)
    merge(str(bases[False]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert_merged(peer, bases[False], tmp_path / "out")
