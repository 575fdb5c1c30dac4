"""Adapters in several safetensors files, as huggingface_hub writes them, with and without index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from support.e2e_kit import LINEARS, stock, wrapped, write_stock

from qcore.adapter.reader import read_adapter
from qcore.adapter.weight_files import INDEX, weights_digest
from qcore.errors import InputError
from qcore.merging.merge import merge
from qcore.plugins.resolve_model import identify

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("sharded") / "base", "vl", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that stock PEFT saved in one file, with random values."""
    folder = tmp_path_factory.mktemp("whole")
    model = wrapped(stock(base, "vl"), r=2, lora_alpha=4, target_modules=list(LINEARS))
    torch.manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn_like(value)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def sharded(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    shutil.copytree(whole, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_torch_state_dict(
        tensors, folder, filename_pattern="adapter_model{suffix}.safetensors", max_shard_size=2000
    )
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("adapter_model-*.safetensors"))


def refused(folder: Path, base: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read_adapter(folder, identify(str(base)).layout, trust_base=True)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("index", [True, False])
def test_shards_merge_as_one_file(
    base: Path, whole: Path, sharded: Path, tmp_path: Path, index: bool
) -> None:
    assert len(shards(sharded)) > 2
    if not index:
        (sharded / INDEX).unlink()
    for name, adapter in (("one", whole), ("many", sharded)):
        merge(str(base), adapter, tmp_path / name, trust_base=True, prove=False)
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert weights_digest(whole) != weights_digest(sharded)


def test_the_file_of_peft_comes_first(base: Path, whole: Path, sharded: Path) -> None:
    shutil.copy(whole / WEIGHTS, sharded / WEIGHTS)
    shards(sharded)[0].write_bytes(b"damaged")
    read = read_adapter(sharded, identify(str(base)).layout, trust_base=True)
    assert {header.file for pair in read.pairs.values() for header in pair.headers} == {WEIGHTS}


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(base: Path, sharded: Path, index: bool) -> None:
    if not index:
        (sharded / INDEX).unlink()
    lost = shards(sharded)[1]
    lost.unlink()
    error = refused(sharded, base)
    assert (error.code, error.field) == ("QC-ADAPTER-003", lost.name)


def test_a_tensor_in_two_shards_is_refused(base: Path, sharded: Path) -> None:
    first, second, *_ = shards(sharded)
    twice = load_file(first)
    save_file(load_file(second) | twice, second)
    error = refused(sharded, base)
    assert error.code == "QC-CKPT-006"
    assert error.field in twice


def test_an_index_that_names_another_shard_is_refused(base: Path, sharded: Path) -> None:
    content = json.loads((sharded / INDEX).read_text())
    name = min(content["weight_map"])
    content["weight_map"][name] = shards(sharded)[-1].name
    (sharded / INDEX).write_text(json.dumps(content))
    error = refused(sharded, base)
    assert (error.code, error.field) == ("QC-CKPT-006", name)


def test_a_damaged_shard_is_named(base: Path, sharded: Path) -> None:
    bad = shards(sharded)[0]
    bad.write_bytes(bad.read_bytes()[:-4])
    assert bad.name in str(refused(sharded, base))
