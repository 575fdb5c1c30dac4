"""Heads, embeddings and saved modules in an adapter: equal to the base, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.change_kit import assert_merged, written
from support.e2e_kit import write_stock

from qcore.errors import QcoreError
from qcore.merging.merge import merge

pytestmark = pytest.mark.usefixtures("one_thread")
Q = {"target_modules": ["q_proj"]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "head": ({"target_modules": ["q_proj", "lm_head"]}, "LoRA on lm_head.weight"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.weight, which"),
    "saved modules": ({**Q, "modules_to_save": ["embed_tokens", "lm_head"]}, "other values"),
    "norms": ({**Q, "modules_to_save": ["input_layernorm"]}, "input_layernorm.weight with other"),
    "token rows": ({**Q, "trainable_token_indices": {"embed_tokens": [3, 5]}}, "trained rows"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A bf16 base by whether its head is tied."""
    return {
        tied: write_stock(tmp_path_factory.mktemp("base"), tied=tied, dtype=torch.bfloat16)
        for tied in (False, True)
    }


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


@pytest.mark.parametrize("recipe", REFUSED)
def test_what_is_not_merged_is_refused_by_its_cause(
    bases: dict[bool, Path], tmp_path: Path, recipe: str
) -> None:
    options, says = REFUSED[recipe]
    written(bases[False], tmp_path / "a", options)
    with pytest.raises(QcoreError, match=says) as caught:
        merge(str(bases[False]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert caught.value.code == "QC-ADAPTER-005"
    assert "merge_and_unload" in str(caught.value.fix)
    assert "trained on" not in str(caught.value.fix)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_refused_with_the_way_to_untie_it(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    written(bases[True], tmp_path / "a", REFUSED["head"][0])
    with pytest.raises(QcoreError, match="lm_head") as caught:
        merge(str(bases[True]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert "tie_word_embeddings to false" in str(caught.value.fix)


def test_added_rows_are_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    written(bases[False], tmp_path / "a", Q, save={"save_embedding_layers": True})
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, value in tensors.items():
        if "embed_tokens" in name or "lm_head" in name:
            tensors[name] = torch.cat([value, value[:2]])
    save_file(tensors, file)
    with pytest.raises(QcoreError, match="2 rows that the base lacks") as caught:
        merge(str(bases[False]), tmp_path / "a", tmp_path / "out", trust_base=True)
    assert "resize_token_embeddings" in str(caught.value.fix)
