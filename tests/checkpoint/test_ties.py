"""A tensor that config.json ties and the files hold nevertheless: equal, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_kit import small_config, small_moe_config, write_index, write_json
from torch import Tensor

from qcore.api.parameters import Table
from qcore.checkpoint import ties
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import survey
from qcore.checkpoint.ties import tie_problems
from qcore.errors import QcoreError
from qcore_qwen35.table import parts

HEAD, EMBED = "lm_head.weight", "model.language_model.embed_tokens.weight"
ROWS = 96


def embedding(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(0)).to(dtype)


def problems(folder: Path, *, headers_only: bool = False) -> list[QcoreError]:
    """The problems of ties alone: the folder has no other tensors than the two."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.headers_only = headers_only
    moe = checkpoint.config["model_type"].endswith("moe")
    layout, _ = survey(Table(list(parts(checkpoint.config, moe=moe))), checkpoint)
    return tie_problems(layout, checkpoint)


def write(folder: Path, head: Tensor, embed: Tensor | None = None, *, moe: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    config = small_moe_config() if moe else small_config()
    write_json(folder / "config.json", config)
    tensors = {EMBED: embedding() if embed is None else embed, HEAD: head}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def last_value(value: Tensor) -> Tensor:
    value = value.clone()
    value[-1, -1] += 1
    return value


def last_bit(value: Tensor) -> Tensor:
    """The smallest difference that a training step leaves."""
    value = value.clone()
    value.view(torch.int16)[50, 3] ^= 1
    return value


DIFFERENT: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "all of it": (lambda value: value + 1, 0),
    "the last value": (last_value, ROWS - 1),
    "one bit in one row": (last_bit, 50),
    "float32 that no bfloat16 holds": (lambda value: value.float() * (1 + 2**-12), 0),
    "float16 that rounds": (lambda value: (value.float() * 1.001).half(), 0),
    "zeros": (torch.zeros_like, 0),
    "rows in another order": (lambda value: value.flip(0).contiguous(), 0),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_head_that_differs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, moe: bool
):
    monkeypatch.setattr(ties, "_CHUNK", 7 * 24 * 2)  # several reads, none ends with a file
    change, row = DIFFERENT[case]
    (error,) = problems(write(tmp_path / "base", change(embedding()), moe=moe))
    assert error.code == "QC-LOAD-002"
    assert error.exit_code == 65
    assert error.field == HEAD
    assert f"row {row} of {ROWS}" in error.message
    assert "tie_word_embeddings" in str(error.fix)


EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "the same bytes": torch.clone,
    "float32 of the same values": Tensor.float,
    "float64 of the same values": Tensor.double,
}


@pytest.mark.parametrize("case", EQUAL)
def test_a_duplicate_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str):
    monkeypatch.setattr(ties, "_CHUNK", 7 * 24 * 2)
    assert problems(write(tmp_path / "base", EQUAL[case](embedding()))) == []


def test_a_duplicate_in_float16_of_a_float32_embedding(tmp_path: Path):
    half = embedding(torch.float16)
    assert problems(write(tmp_path / "base", half, half.float())) == []


def test_two_shards_that_are_links_of_a_hub_cache(tmp_path: Path):
    folder, blobs = tmp_path / "repo" / "snapshots" / "0123", tmp_path / "repo" / "blobs"
    folder.parent.mkdir(parents=True)
    blobs.mkdir()
    write(folder, last_value(embedding()))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, blobs / f"{number}")
        target = os.path.relpath(blobs / f"{number}", folder)
        (folder / f"model-{number}.safetensors").symlink_to(target)
    write_index(folder, {name: f"model-{n}.safetensors" for n, name in enumerate(tensors)})
    (error,) = problems(folder)
    assert error.code == "QC-LOAD-002"


def test_a_head_of_another_shape_is_the_layout_s_problem(tmp_path: Path):
    assert problems(write(tmp_path / "base", embedding()[:-1].contiguous())) == []


def test_an_untied_head_is_not_compared(tmp_path: Path):
    folder = write(tmp_path / "base", last_value(embedding()))
    write_json(folder / "config.json", small_config(tied=False))
    assert problems(folder) == []


def test_weights_on_the_hub_are_not_compared(tmp_path: Path):
    folder = write(tmp_path / "base", last_value(embedding()))
    assert problems(folder, headers_only=True) == []
