"""What binds an adapter to its base: the same over every way to lay the same tensors on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.model_kit import small_config, small_shapes, write_index, write_json

from qcore.api.parameters import Table
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.fingerprint import fingerprints
from qcore.checkpoint.layout import locate
from qcore.nn.load import as_bytes, read_tensor
from qcore_qwen35.table import parts

EMBED = "model.language_model.embed_tokens.weight"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in small_shapes().items()
    }


def print_of(
    folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1, **config: Any
) -> dict[str, str]:
    """Write the tensors in this layout, read them back, take the fingerprints."""
    folder.mkdir()
    write_json(folder / "config.json", small_config(**config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names = sorted(tensors)
        files = {name: f"s{n % shards}.safetensors" for n, name in enumerate(names)}
        for file in set(files.values()):
            save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
        write_index(folder, files)
    checkpoint = Checkpoint.open(folder)
    layout = locate(Table(list(parts(checkpoint.config))), checkpoint)
    digests = {
        name: hashlib.sha256(as_bytes(read_tensor(checkpoint, item))).hexdigest()
        for name, item in layout.located.items()
        if item.tied is None
    }
    return fingerprints(layout, digests)


def test_layout_does_not_change_it(tmp_path: Path, tensors: dict[str, torch.Tensor]):
    hub = print_of(tmp_path / "hub", tensors)
    assert set(hub) == {"text", "mtp"}
    assert print_of(tmp_path / "sharded", tensors, shards=3) == hub
    text = {
        name.replace("model.language_model.", "model."): value
        for name, value in tensors.items()
        if not name.startswith(("mtp.", "model.visual."))
    }
    # A text save lacks two parts; what is left is the same base.
    assert print_of(tmp_path / "text", text) == {"text": hub["text"]}
    tied = tensors | {"lm_head.weight": tensors[EMBED].clone()}
    assert print_of(tmp_path / "tied", tied) == hub


@pytest.mark.parametrize(
    "name", [EMBED, "model.language_model.layers.1.linear_attn.A_log",
             "model.language_model.layers.3.self_attn.k_norm.weight"],
)  # fmt: skip
def test_one_bit_changes_its_part_alone(
    tmp_path: Path, tensors: dict[str, torch.Tensor], name: str
):
    hub = print_of(tmp_path / "hub", tensors)
    tensors[name].view(torch.int16).view(-1)[-1] ^= 1
    other = print_of(tmp_path / "other", tensors)
    assert other["text"] != hub["text"]
    assert other["mtp"] == hub["mtp"]


def test_dtype_and_place_are_in_it(tmp_path: Path, tensors: dict[str, torch.Tensor]):
    hub = print_of(tmp_path / "hub", tensors)
    same_bytes = {name: value.view(torch.float16) for name, value in tensors.items()}
    assert print_of(tmp_path / "halves", same_bytes)["text"] != hub["text"]
    one, two = (f"model.language_model.layers.{n}.mlp.up_proj.weight" for n in (0, 1))
    swapped = tensors | {one: tensors[two], two: tensors[one]}
    assert print_of(tmp_path / "swapped", swapped)["text"] != hub["text"]


def test_a_part_that_was_not_read_whole_has_none(tmp_path: Path, tensors: dict[str, torch.Tensor]):
    print_of(tmp_path / "hub", tensors)
    checkpoint = Checkpoint.open(tmp_path / "hub")
    layout = locate(Table(list(parts(checkpoint.config))), checkpoint)
    digests = {name: "0" * 64 for name in layout.located if not name.startswith("mtp.")}
    assert set(fingerprints(layout, digests)) == {"text"}
    digests.pop(EMBED)
    assert fingerprints(layout, digests) == {}
