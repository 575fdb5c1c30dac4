"""Adapters whose names have wrappers of other trainers: the same weights and the same merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.e2e_kit import LINEARS, stock, wrapped, write_stock

from qcore.adapter.reader import read_adapter
from qcore.adapter.wrapped_names import without_wrappers
from qcore.checkpoint.checkpoint import Header
from qcore.errors import InputError, QcoreError
from qcore.merging.merge import merge
from qcore.plugins.resolve_model import identify

PEFT = "base_model.model."
Rename = Callable[[str], str]

#: Names as torch.compile, FSDP, DDP, state dicts, AutoModel and transformers 4 have them.
WRAPPED: dict[str, Rename] = {
    "torch.compile": lambda name: "_orig_mod." + name,
    "torch.compile of layers": lambda name: name.replace(".self_attn.", "._orig_mod.self_attn."),
    "FSDP": lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "checkpointing": lambda name: name.replace(
        ".mlp.", "._checkpoint_wrapped_module._orig_mod.mlp."
    ),
    "DDP": lambda name: "module." + name,
    "state dict": lambda name: name.replace(".weight", ".default.weight"),
    "another adapter's name": lambda name: name.replace(".weight", ".my-adapter.weight"),
    "twice": lambda name: PEFT + name,
    "without PEFT's prefix": lambda name: name.removeprefix(PEFT),
    "transformers 4": lambda name: name.replace("model.language_model.", "language_model.model."),
    "AutoModel": lambda name: name.replace(f"{PEFT}model.", PEFT),
    "text AutoModel": lambda name: name.replace("model.language_model.", ""),
    "all of them": lambda name: (
        "module._orig_mod."
        + name.replace("model.language_model.", "language_model.").replace(
            ".weight", ".default.weight"
        )
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("wrapped") / "base", "vl", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that stock PEFT saved, with random values."""
    folder = tmp_path_factory.mktemp("adapter")
    model = wrapped(stock(base, "vl"), r=2, lora_alpha=4, target_modules=list(LINEARS))
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn_like(value)
    model.save_pretrained(folder)
    return folder


def _renamed(adapter: Path, folder: Path, rename: Rename) -> Path:
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_model.safetensors"
    save_file({rename(name): value for name, value in load_file(file).items()}, file)
    return folder


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_names_are_those_weights(
    base: Path, adapter: Path, tmp_path: Path, rename: Rename
) -> None:
    layout = identify(str(base)).layout
    expected = read_adapter(adapter, layout, trust_base=True)
    read = read_adapter(_renamed(adapter, tmp_path, rename), layout, trust_base=True)
    # The order of tensors in the two files differs, so values are compared by name in the file.
    assert {name: rename(pair.pieces[0].a.name) for name, pair in expected.pairs.items()} == {
        name: pair.pieces[0].a.name for name, pair in read.pairs.items()
    }
    assert {name: rename(pair.pieces[0].b.name) for name, pair in expected.pairs.items()} == {
        name: pair.pieces[0].b.name for name, pair in read.pairs.items()
    }
    assert any("without wrappers" in note for note in read.notes)
    assert not any("without wrappers" in note for note in expected.notes)


def test_the_merge_has_the_same_values(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(str(base), adapter, tmp_path / "plain", trust_base=True, prove=False)
    foreign = _renamed(adapter, tmp_path / "foreign", WRAPPED["all of them"])
    merge(str(base), foreign, tmp_path / "merged", trust_base=True)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert plain.keys() == merged.keys()
    assert all(torch.equal(plain[name], merged[name]) for name in plain)


def test_experts_keep_their_nesting(tmp_path: Path) -> None:
    base = write_stock(tmp_path / "base", "vl", moe=True, dtype=torch.bfloat16)
    model = wrapped(
        stock(base, "vl", moe=True), r=2, lora_alpha=4, target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    layout = identify(str(base)).layout
    expected = read_adapter(tmp_path / "adapter", layout, trust_base=True)
    for number, rename in enumerate(WRAPPED.values()):
        foreign = _renamed(tmp_path / "adapter", tmp_path / str(number), rename)
        read = read_adapter(foreign, layout, trust_base=True)
        assert {name: rename(pair.pieces[0].a.name) for name, pair in expected.pairs.items()} == {
            name: pair.pieces[0].a.name for name, pair in read.pairs.items()
        }


def _second(adapter: Path, folder: Path, rename: Rename) -> Path:
    """The adapter, with one of its tensors a second time."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if rename(name) != name)
    save_file(tensors | {rename(name): tensors[name].clone()}, file)
    return folder


@pytest.mark.parametrize("rename", WRAPPED.values(), ids=WRAPPED)
def test_two_tensors_with_one_name_are_refused(
    base: Path, adapter: Path, tmp_path: Path, rename: Rename
) -> None:
    folder = _second(adapter, tmp_path, rename)
    with pytest.raises(InputError) as caught:
        read_adapter(folder, identify(str(base)).layout, trust_base=True)
    assert caught.value.code == "QC-ADAPTER-017"


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("model.language_model.", "model.decoder."),
        lambda name: name.replace("model.language_model.", "model.visual."),
        lambda name: name.replace("model.language_model.layers.0.", "model.language_model.0."),
        lambda name: name.replace("self_attn.", ""),
    ],
)
def test_another_prefix_matches_no_weight(
    base: Path, adapter: Path, tmp_path: Path, rename: Rename
) -> None:
    folder = _renamed(adapter, tmp_path, rename)
    with pytest.raises(QcoreError) as caught:
        read_adapter(folder, identify(str(base)).layout, trust_base=True)
    assert "matches no weight of this base" in str(caught.value)


def _names(base: Path, names: dict[str, tuple[int, ...]]) -> list[str]:
    """The names that tensors of an adapter get on a base."""
    headers = {
        name: Header(name=name, dtype="F32", shape=shape, file="f", start=0, end=0)
        for name, shape in names.items()
    }
    return [*without_wrappers(base, headers, identify(str(base)).layout)[0]]


ROOT = f"{PEFT}model.language_model"


@pytest.mark.parametrize(
    ("written", "peft"),
    [
        ("{}.layers.3.self_attn.q_proj.lora_magnitude_vector.default.weight",
         "{}.layers.3.self_attn.q_proj.lora_magnitude_vector"),
        ("{}.layers.3.self_attn.q_proj.lora_magnitude_vector.default",
         "{}.layers.3.self_attn.q_proj.lora_magnitude_vector"),
        ("{}.embed_tokens.lora_embedding_A.default", "{}.embed_tokens.lora_embedding_A"),
        ("{}.embed_tokens.lora_embedding_B", "{}.embed_tokens.lora_embedding_B"),
        ("{}.embed_tokens.modules_to_save.default.weight", "{}.embed_tokens.weight"),
        ("{}.embed_tokens.original_module.weight", "{}.embed_tokens.base_layer.weight"),
        ("{}.embed_tokens.token_adapter.trainable_tokens_delta.default",
         "{}.embed_tokens.token_adapter.trainable_tokens_delta"),
        ("{}.embed_tokens.weight", "{}.embed_tokens.weight"),
        ("{}.layers.0.linear_attn.in_proj_q.lora_A.weight",
         "{}.layers.0.linear_attn.in_proj_q.lora_A.weight"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name,
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name.removeprefix(PEFT),
        lambda name: name.replace("model.language_model.", "language_model.model."),
    ],
    ids=["plain", "torch.compile", "DDP", "transformers 4"],
)
def test_every_kind_of_tensor(base: Path, written: str, peft: str, wrap: Rename) -> None:
    """LoRA in PEFT's layout decides the class; the others follow it."""
    lora = f"{ROOT}.layers.3.self_attn.q_proj.lora_A.weight"
    names = {lora: (2, 4), wrap(written.format(ROOT)): (2, 4)}
    assert _names(base, names) == [lora, peft.format(ROOT)]


def test_a_weight_of_another_layout_keeps_its_name(base: Path) -> None:
    names = {"blk.0.gate.down.weight": (2, 4), "module.else.weight": (1,), "blk.1.up": (1,)}
    assert _names(base, names) == [*names]
