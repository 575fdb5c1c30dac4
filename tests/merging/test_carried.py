"""Merging into the plain weights of a quantized base: packed bytes are carried, targets refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.change_kit import step, written
from support.cli_kit import here
from support.conversations import conversations, write_rows
from support.e2e_kit import LENGTHS, documents, our_logits, ours, write_stock
from support.moe_kit import INDEX, exact, rewrite, tensors_of
from support.packed_kit import PACKERS, write_packed
from support.tiers import fast
from torch import Tensor

from qcore.config.settings import Settings
from qcore.errors import InputError, QcoreError
from qcore.io.artifact import read_manifest
from qcore.merging.merge import merge
from qcore.merging.quantized_base import incomparable_parts
from qcore.plugins.resolve_model import identify
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
MLP = r"layers\.\d+\.mlp\.(gate|up|down)_proj\.weight$"
ATTENTION = {"target_modules": ["q_proj", "o_proj", "in_proj_qkv"]}


@pytest.fixture(scope="module")
def plain(once: Callable[..., Path]) -> Path:
    return once(
        "carried-plain", lambda home: write_stock(home, "vl", tied=False, dtype=torch.bfloat16)
    )


@pytest.fixture(scope="module")
def adapter(plain: Path, once: Callable[..., Path]) -> Path:
    """Attention alone, as PEFT saves it."""
    return once("carried-adapter", lambda home: written(plain, home / "a", ATTENTION)) / "a"


def same_bytes(one: Tensor, two: Tensor) -> bool:
    return (
        (one.dtype, one.shape) == (two.dtype, two.shape)
        and one.contiguous().view(-1).view(torch.uint8).tolist()
        == two.contiguous().view(-1).view(torch.uint8).tolist()
    )  # fmt: skip


@pytest.mark.parametrize("packer", fast(PACKERS, "nvfp4-compressed", "fp8-blocks"))
def test_packed_bytes_are_carried(plain: Path, adapter: Path, tmp_path: Path, packer: str) -> None:
    base, out = write_packed(plain, tmp_path / "base", packer, MLP), tmp_path / "out"
    report = merge(str(base), adapter, out, trust_base=True)
    before, after, original = tensors_of(base), tensors_of(out), tensors_of(plain)
    sums = exact(plain, adapter)
    assert list(after) == list(before)
    assert len(sums) == report.changed > 0
    for name, value in after.items():
        if name in sums:
            apart = (value.float() - sums[name]).abs()
            assert bool((apart <= step(sums[name])).all()), name
            assert not torch.equal(value, original[name])
        else:
            assert same_bytes(value, before[name]), name
    for name in ("config.json", INDEX):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert report.proof is not None
    assert report.proof["difference"] <= 1e-4
    assert report.proof["effect"] > 0.01
    packed = 0 if packer == "fp8-blocks" else 12
    assert report.proof.get("stand_ins", 0) == packed
    assert any("kept as they are, byte for byte" in line for line in report.warnings)
    assert read_manifest(out).meta["decoded"] is None


@pytest.mark.parametrize("packer", fast(PACKERS, "gptq", "fp8-blocks"))
def test_a_packed_target_is_refused_by_its_tensor(plain: Path, tmp_path: Path, packer: str) -> None:
    recipe = {"target_modules": ["q_proj", "down_proj"]}
    written(plain, tmp_path / "a", recipe)
    leaf = {"gptq": "qweight", "awq": "qweight", "nvfp4-compressed": "weight_packed"}
    base = write_packed(plain, tmp_path / packer, packer, MLP, base="some-org/original")
    with pytest.raises(InputError) as error:
        merge(str(base), tmp_path / "a", tmp_path / "out", trust_base=True)
    code = "QC-MERGE-008" if packer == "fp8-blocks" else "QC-CKPT-008"
    assert error.value.code == code
    found = str(error.value.field)
    assert found.startswith("model.language_model.layers.0.mlp.down_proj.")
    assert found.endswith(leaf.get(packer, "weight_packed" if "int4" in packer else "weight"))
    assert "some-org/original" in str(error.value.fix)
    assert ("--dequantize" in str(error.value.fix)) == (packer == "fp8-blocks")
    assert not (tmp_path / "out").exists()
    merge(str(plain), tmp_path / "a", tmp_path / "out", trust_base=True)  # the way that is named


def test_what_cannot_be_decoded_is_not_dequantized(
    plain: Path, adapter: Path, tmp_path: Path
) -> None:
    base = write_packed(plain, tmp_path / "base", "awq", MLP)
    with pytest.raises(InputError) as error:
        merge(str(base), adapter, tmp_path / "out", trust_base=True, dequantize=True)
    assert error.value.code == "QC-CKPT-008"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["quantization", "quantisation"])
def test_manifests_of_adapters_spell_quantization_either_way(key: str) -> None:
    """Manifests of the first version have the British spelling."""
    adapter: Any = SimpleNamespace(meta={"model": {key: {"readable": True}}}, fingerprints={})
    base: Any = None  # not asked: the adapter was trained on decoded values
    assert incomparable_parts(base, adapter) == set()


@pytest.mark.slow
@pytest.mark.parametrize("packer", ["nvfp4-modelopt", "gptq", "fp8-blocks"])
def test_packed_experts(tmp_path: Path, packer: str) -> None:
    """Experts apart and packed, attention plain: the public 4-bit mixtures of experts."""
    stocked = write_stock(
        tmp_path / "stock", "text", tied=False, moe=True, dtype=torch.bfloat16,
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        num_experts=8, moe_intermediate_size=16,
    )  # fmt: skip
    split = rewrite(stocked, tmp_path / "apart", "apart")
    base = write_packed(split, tmp_path / "base", packer, r"mlp\.experts\.\d+\.")
    rows = write_rows(tmp_path / "rows.jsonl", conversations(8))
    maps = [entry for entry in identify(str(split)).layout.table if entry.row.kind is not None]
    groups = {entry.row.group for entry in maps if "attn" in entry.name}
    settings = Settings(
        max_steps=2, r=4, dtype="fp32", save_steps=0, per_device_train_batch_size=4,
        gradient_accumulation_steps=1, learning_rate=2e-2, target_groups=tuple(sorted(groups)),
    )  # fmt: skip
    train(str(split), rows, tmp_path / "a", settings, device="cpu")
    report = merge(str(base), tmp_path / "a", tmp_path / "out")
    assert any("are not compared with those" in line for line in report.warnings)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {name for name in after if not same_bytes(after[name], before[name])}
    assert len(changed) == report.changed
    assert all("attn" in name for name in changed)
    whole = tensors_of(merge(str(split), tmp_path / "a", tmp_path / "whole").output)
    assert all(same_bytes(after[name], whole[name]) for name in changed)


@pytest.mark.slow
def test_a_plain_weight_that_differs_is_another_base(plain: Path, tmp_path: Path) -> None:
    """AWQ may move scales into a norm: an adapter of the original does not fit then."""
    rows = write_rows(tmp_path / "rows.jsonl", conversations(8))
    table = identify(str(plain)).layout.table
    group = next(
        entry.row.group for entry in table if entry.name.endswith("self_attn.q_proj.weight")
    )
    settings = Settings(
        max_steps=1, r=2, dtype="fp32", save_steps=0, per_device_train_batch_size=2,
        gradient_accumulation_steps=1, learning_rate=1e-2, target_groups=(group,),
    )  # fmt: skip
    train(str(plain), rows, tmp_path / "a", settings, device="cpu")
    base = write_packed(plain, tmp_path / "base", "awq", MLP)
    assert merge(str(base), tmp_path / "a", tmp_path / "same").changed
    name = "model.language_model.layers.2.input_layernorm.weight"
    file = base / json.loads((base / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name] * 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        merge(str(base), tmp_path / "a", tmp_path / "out")
    assert (error.value.code, error.value.field) == ("QC-MERGE-001", name)


def test_other_verbs_refuse(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = write_packed(plain, tmp_path / "base", "gptq", MLP, base="some-org/original")
    ended = here(capsys, "inspect", base)
    assert ended.code == 65
    assert "QC-CKPT-008" in ended.err
    assert "some-org/original" in ended.err
    with pytest.raises(QcoreError) as error:
        identify(str(base))
    assert error.value.code == "QC-CKPT-008"


def test_what_is_missing_or_misshapen_is_named(plain: Path, adapter: Path, tmp_path: Path) -> None:
    base = write_packed(plain, tmp_path / "base", "nvfp4-modelopt", MLP)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    file = base / json.loads((base / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = tensors[name][:, 1:].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        merge(str(base), adapter, tmp_path / "out", trust_base=True)
    assert (error.value.code, error.value.field) == ("QC-KEY-003", name)


def test_the_carried_base_still_computes(plain: Path, adapter: Path, tmp_path: Path) -> None:
    """Block FP8 can be read: the merge of what is plain is the merge of the decoded copy."""
    base = write_packed(plain, tmp_path / "base", "fp8-blocks", MLP)
    merge(str(base), adapter, tmp_path / "one", trust_base=True)
    merge(str(base), adapter, tmp_path / "two", trust_base=True, dequantize=True)
    docs = documents(LENGTHS)
    assert torch.equal(
        our_logits(ours(tmp_path / "one"), docs), our_logits(ours(tmp_path / "two"), docs)
    )
