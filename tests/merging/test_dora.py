"""DoRA: m / ||W + s B A|| (W + s B A), merged and generated with, against stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.change_kit import assert_merged, written
from support.e2e_kit import LENGTHS, LINEARS, documents, our_logits, stock_logits, write_stock
from support.model_kit import edit_json

from qcore.adapter.evidence import read_for
from qcore.adapter.open import open_adapter
from qcore.config.settings import Settings
from qcore.errors import InputError, QcoreError
from qcore.inference.generate import Generator
from qcore.merging.merge import merge
from qcore.plugins.resolve_model import identify
from qcore.training.initial_settings import adapter_settings

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES: dict[str, dict[str, Any]] = {
    "all ten": {"target_modules": list(LINEARS)},
    "rslora": {"target_modules": ["q_proj", "in_proj_qkv"], "use_rslora": True, "r": 8},
    "patterns": {
        "target_modules": ["down_proj", "o_proj"], "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
    "some layers": {"target_modules": ["gate_proj", "out_proj"], "layers_to_transform": [0, 2]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("vl"), tied=False, dtype=torch.bfloat16)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_merge_is_pefts(base: Path, tmp_path: Path, recipe: str) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    peer = written(base, adapter, RECIPES[recipe] | {"use_dora": True})
    report = merge(str(base), adapter, out, trust_base=True)
    assert report.proof is not None
    assert report.proof["effect"] > 0.1
    assert len(assert_merged(peer, base, out)) == report.pairs == report.changed


def test_a_text_base_and_an_fp32_base(tmp_path: Path) -> None:
    for kind, dtype in (("text", torch.bfloat16), ("vl", torch.float32)):
        here = tmp_path / kind
        base = write_stock(here / "base", kind, dtype=dtype)
        peer = written(
            base, here / "a", {"target_modules": ["v_proj"], "use_dora": True}, kind=kind
        )
        merge(str(base), here / "a", here / "out", trust_base=True)
        assert assert_merged(peer, base, here / "out", kind=kind)


def test_generate_computes_what_peft_computes(base: Path, tmp_path: Path) -> None:
    peer = written(base, tmp_path / "a", RECIPES["all ten"] | {"use_dora": True})
    docs = documents(LENGTHS)
    model = Generator(
        str(base), adapter=tmp_path / "a", trust_base=True, device="cpu", dtype="fp32"
    ).model
    gap = (our_logits(model, docs) - stock_logits(peer, docs)).abs().max()
    assert float(gap) <= 1e-4


def test_a_weight_in_rows_of_zero_length_is_refused(base: Path, tmp_path: Path) -> None:
    """B = 0 and W = 0 in a row: PEFT's merge has NaN there."""
    written(base, tmp_path / "a", {"target_modules": ["q_proj"], "use_dora": True})
    zero = tmp_path / "zero"
    zero.mkdir()
    for path in base.iterdir():
        (zero / path.name).write_bytes(path.read_bytes())
    weights = load_file(zero / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    weights[name][3] = 0
    save_file(weights, zero / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key, value in tensors.items():
        if "lora_B" in key:
            value[3] = 0
    save_file(tensors, file)
    with pytest.raises(QcoreError, match="DoRA on a row that is 0") as caught:
        merge(str(zero), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert (caught.value.code, caught.value.field) == ("QC-MERGE-003", name)
    assert caught.value.found == "row 3"
    assert not (tmp_path / "out").exists()
    with pytest.raises(QcoreError, match="DoRA on a row that is 0"):
        Generator(str(zero), adapter=tmp_path / "a", trust_base=True, device="cpu", dtype="fp32")


def test_a_missing_magnitude_and_one_without_the_field(base: Path, tmp_path: Path) -> None:
    written(base, tmp_path / "a", {"target_modules": ["q_proj"], "use_dora": True})
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: v for n, v in tensors.items() if "magnitude" not in n}, file)
    with pytest.raises(QcoreError, match="use_dora is true") as caught:
        merge(str(base), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert caught.value.code == "QC-ADAPTER-006"
    save_file(tensors, file)
    edit_json(tmp_path / "a" / "adapter_config.json", lambda c: c.update(use_dora=False))
    with pytest.raises(QcoreError, match="use_dora is false") as caught:
        merge(str(base), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert caught.value.code == "QC-ADAPTER-005"


def test_names_of_older_peft_with_a_weight_at_the_end(base: Path, tmp_path: Path) -> None:
    peer = written(base, tmp_path / "a", {"target_modules": ["q_proj"], "use_dora": True})
    file = tmp_path / "a" / "adapter_model.safetensors"
    renamed = {n + ".weight" * n.endswith("vector"): v for n, v in load_file(file).items()}
    save_file(renamed, file)
    merge(str(base), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert assert_merged(peer, base, tmp_path / "out")


def test_open_adapter_refuses_what_it_cannot_show(base: Path, tmp_path: Path) -> None:
    written(base, tmp_path / "a", {"target_modules": ["q_proj"], "use_dora": True})
    with pytest.raises(InputError) as caught:
        open_adapter(tmp_path / "a", str(base), trust_base=True)
    assert caught.value.code == "QC-ADAPTER-016"


def test_training_continues_it(base: Path, tmp_path: Path) -> None:
    written(base, tmp_path / "a", {"target_modules": list(LINEARS), "use_dora": True})
    model = identify(str(base))
    adapter = read_for(model, tmp_path / "a", trust_base=True)
    assert adapter_settings(adapter, model.layout, Settings(), ()).use_dora
