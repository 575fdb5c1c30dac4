"""`qcore adapter extract`: a LoRA that stock PEFT merged comes back, with its error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_kit import here
from support.e2e_kit import LINEARS, stock, wrapped, write_stock
from support.model_kit import edit_json

from qcore.adapter.compare import compare_adapters
from qcore.errors import InputError, NumericError
from qcore.io.artifact import read_manifest
from qcore.merging import extracted_folder
from qcore.merging.extract import extract
from qcore.merging.low_rank import low_rank
from qcore.merging.merge import merge

MODEL = "model.safetensors"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tuned_by_peft(
    base: Path, folder: Path, adapter: Path, *, moe: bool = False, **lora: Any
) -> None:
    """Save an adapter with random values and, with stock PEFT in float32, base + adapter."""
    model = wrapped(stock(base, "vl", moe=moe), **lora)
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn_like(value)
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(folder)
    for path in base.iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("extract") / "base", "vl")


@pytest.fixture(scope="module")
def dense(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The checkpoint that PEFT merged in float32, and its adapter of rank 3."""
    folder = tmp_path_factory.mktemp("dense")
    tuned_by_peft(base, folder / "tuned", folder / "adapter", r=3, lora_alpha=6,
                  target_modules=list(LINEARS))  # fmt: skip
    return folder / "tuned", folder / "adapter"


@pytest.mark.parametrize("r", [3, 5])
def test_pefts_lora_comes_back(
    base: Path, dense: tuple[Path, Path], tmp_path: Path, r: int
) -> None:
    tuned, adapter = dense
    report = extract(str(base), str(tuned), tmp_path / "out", r=r)
    pairs = len(load_file(adapter / "adapter_model.safetensors")) // 2
    assert (len(report.weights), report.left_out) == (pairs, {})
    assert report.relative_error < 2e-6  # the merge was rounded to float32
    found = compare_adapters(adapter, tmp_path / "out")
    assert found.relative is not None
    assert found.relative < 2e-6
    model = peft.PeftModel.from_pretrained(stock(base, "vl"), str(tmp_path / "out"))
    merged, expected = model.merge_and_unload().state_dict(), stock(tuned, "vl").state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


def test_a_smaller_rank_leaves_what_the_singular_values_say(
    base: Path, dense: tuple[Path, Path], tmp_path: Path
) -> None:
    report = extract(str(base), str(dense[0]), tmp_path / "out", r=1)
    one, other = load_file(base / MODEL), load_file(dense[0] / MODEL)
    for name, weight in report.weights.items():
        s = torch.linalg.svdvals(other[name].double() - one[name].double())
        assert weight.norm == pytest.approx(float(s.norm()), rel=1e-6)
        assert weight.error == pytest.approx(float(s[1:].norm()), rel=1e-5)
    assert report.relative_error > 0.1


def test_experts_are_approximated_one_by_one(tmp_path: Path) -> None:
    base = write_stock(tmp_path / "base", "vl", moe=True)
    tuned_by_peft(base, tmp_path / "tuned", tmp_path / "adapter", moe=True, r=2, lora_alpha=4,
                  target_modules=["q_proj"], target_parameters=EXPERTS)  # fmt: skip
    report = extract(str(base), str(tmp_path / "tuned"), tmp_path / "out", r=2)
    assert report.relative_error < 3e-6
    assert {line["group"] for line in report.groups()} == {"attn", "experts"}
    found = compare_adapters(tmp_path / "adapter", tmp_path / "out")
    assert found.relative is not None
    assert found.relative < 3e-6


def steps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The difference of two bf16 tensors in steps of bf16."""
    size = torch.maximum(one.abs(), other.abs()).float().clamp_min(1e-30)
    return (one.float() - other.float()).abs() / torch.exp2(torch.floor(torch.log2(size)) - 7)


@pytest.mark.parametrize("r", [3, 100])
def test_it_merges_back_to_the_tuned_checkpoint(tmp_path: Path, r: int) -> None:
    base = write_stock(tmp_path / "base", "vl", dtype=torch.bfloat16)
    model = wrapped(stock(base, "vl"), r=3, lora_alpha=6, target_modules=list(LINEARS))
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn_like(value)
    tuned = model.merge_and_unload().to(torch.bfloat16)
    tuned.save_pretrained(tmp_path / "tuned")
    for path in base.iterdir():
        if not (tmp_path / "tuned" / path.name).exists():
            shutil.copy(path, tmp_path / "tuned" / path.name)
    report = extract(str(base), str(tmp_path / "tuned"), tmp_path / "out", r=r)
    # The folder has a fingerprint of its base, so that no consent is needed.
    merge(str(base), tmp_path / "out", tmp_path / "back", prove=False)
    wanted, back = load_file(tmp_path / "tuned" / MODEL), load_file(tmp_path / "back" / MODEL)
    assert wanted.keys() == back.keys()
    far = torch.cat([steps(value, back[name]).flatten() for name, value in wanted.items()])
    if r == 100:  # the full rank of every weight here
        assert float(far.max()) <= 1
    else:
        # The difference of the checkpoints has the rank of LoRA but for the rounding to bf16.
        assert report.relative_error < 0.02
        assert float((far <= 1).float().mean()) > 0.95


def changed(base: Path, folder: Path, ends: str) -> Path:
    shutil.copytree(base, folder)
    tensors = load_file(folder / MODEL)
    name = next(name for name in sorted(tensors) if name.endswith(ends))
    tensors[name] = tensors[name] + 0.25
    save_file(tensors, folder / MODEL, {"format": "pt"})
    return folder


@pytest.mark.parametrize("ends", ["input_layernorm.weight", "embed_tokens.weight", "conv1d.weight"])
def test_what_lora_cannot_change_is_refused_or_left_out(
    base: Path, dense: tuple[Path, Path], tmp_path: Path, ends: str
) -> None:
    tuned = changed(dense[0], tmp_path / "tuned", ends)
    with pytest.raises(InputError) as caught:
        extract(str(base), str(tuned), tmp_path / "out", r=3)
    assert caught.value.code == "QC-EXTRACT-002"
    assert str(caught.value.field).endswith(ends)
    assert not (tmp_path / "out").exists()
    report = extract(str(base), str(tuned), tmp_path / "out", r=3, partial=True)
    (left,) = report.left_out
    assert left.endswith(ends)
    assert report.relative_error < 2e-6


def test_an_embedding_of_another_size_is_left_out_and_the_base_still_recorded(
    base: Path, dense: tuple[Path, Path], tmp_path: Path
) -> None:
    """The fingerprint of the base covers what is not compared, so that merges check all of it."""
    tuned = shutil.copytree(dense[0], tmp_path / "tuned")
    tensors = load_file(tuned / MODEL)
    for name, value in tensors.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[name] = torch.cat([value, value[:8]])
    save_file(tensors, tuned / MODEL, {"format": "pt"})
    size = len(load_file(base / MODEL)["model.language_model.embed_tokens.weight"]) + 8
    edit_json(tuned / "config.json", lambda c: c["text_config"].update(vocab_size=size))
    extract(str(base), str(tuned), tmp_path / "out", r=3, partial=True)
    meta = read_manifest(tmp_path / "out").meta
    assert "text" in meta["fingerprints"]
    merge(str(base), tmp_path / "out", tmp_path / "back", prove=False)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_only_the_tuned_checkpoint_unties(tmp_path: Path, same: bool) -> None:
    """It has another dtype there; with the values of the embedding it counts as equal."""
    base = write_stock(tmp_path / "base", "vl", tied=True, dtype=torch.bfloat16)
    tuned = shutil.copytree(base, tmp_path / "tuned")
    tensors = load_file(tuned / MODEL)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = tensors[name] + 0.25
    embedding = tensors["model.language_model.embed_tokens.weight"].float()
    tensors["lm_head.weight"] = embedding if same else embedding + 0.25
    save_file(tensors, tuned / MODEL, {"format": "pt"})

    def untie(config: Any) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False

    edit_json(tuned / "config.json", untie)
    report = extract(str(base), str(tuned), tmp_path / "out", r=2, partial=True)
    assert report.left_out == ({} if same else {"lm_head.weight": "tied in the base"})
    assert [*report.weights] == [name]


def test_matrices_that_are_written_wrong_are_seen(
    base: Path, dense: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = extracted_folder.tensors_of

    def swapped(*args: Any) -> dict[str, torch.Tensor]:
        tensors = real(*args)
        names = [name for name in tensors if "gate_proj.lora_B" in name][:2]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
        return tensors

    monkeypatch.setattr(extracted_folder, "tensors_of", swapped)
    with pytest.raises(NumericError, match="does not hold the matrices") as caught:
        extract(str(base), str(dense[0]), tmp_path / "out", r=2)
    assert caught.value.code == "QC-MERGE-005"
    assert [*tmp_path.iterdir()] == []


def test_equal_checkpoints_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        extract(str(base), str(base), tmp_path / "out", r=2)
    assert caught.value.code == "QC-EXTRACT-003"


def test_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    other = write_stock(tmp_path / "other", "vl", intermediate_size=96)
    with pytest.raises(InputError) as caught:
        extract(str(base), str(other), tmp_path / "out", r=2)
    assert caught.value.code == "QC-EXTRACT-001"


def test_a_weight_that_is_not_finite_is_named(
    base: Path, dense: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(dense[0], tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / MODEL)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "tuned" / MODEL, {"format": "pt"})
    with pytest.raises(NumericError) as caught:
        extract(str(base), str(tmp_path / "tuned"), tmp_path / "out", r=2)
    assert (caught.value.code, caught.value.field) == ("QC-LOAD-003", name)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (600, 900), (900, 600)])
def test_low_rank_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, s, v = torch.linalg.svd(values, full_matrices=False)
    s = s * 0.9 ** torch.arange(len(s), dtype=torch.float64)
    matrix = u * s @ v
    found = low_rank(matrix, 8)
    assert found.norm == pytest.approx(float(s.norm()), rel=1e-6)
    assert found.error == pytest.approx(float(s[8:].norm()), rel=1e-3)
    exact = low_rank((u[:, :8] * s[:8] @ v[:8]).float(), 8)
    assert exact.error < 1e-6 * exact.norm


def test_the_command(
    base: Path, dense: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("adapter", "extract", "--base", base, "--model", dense[0], "--rank", "3")
    ended = here(capsys, *words, "--output", tmp_path / "one")
    assert ended.code == 0, ended.err
    for word in ("LoRA pairs of rank 3", "attn", "largest_relative_error"):
        assert word in ended.out
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert "extracted with qcore" in (tmp_path / "one" / "README.md").read_text()
    ended = here(capsys, "verify", tmp_path / "one")
    assert ended.code == 0, ended.err
    ended = here(capsys, *words, "--output", tmp_path / "two", "--json")
    assert (ended.code, ended.json["left_out"]) == (0, {})
    ended = here(capsys, *words, "--output", tmp_path / "two", "--json")
    assert ended.json["error"]["code"] == "QC-WRITE-001"
