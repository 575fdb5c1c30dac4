"""A merge refuses an absurd change, and names what is not finite in the base."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversations import conversations, write_rows
from support.e2e_kit import figure, resave, write_stock
from support.run_kit import SHORT, start
from support.sinks import Heard

from qcore.checkpoint.checkpoint import Header
from qcore.errors import InputError, NumericError
from qcore.io.artifact import read_manifest
from qcore.merging.merge import merge
from qcore.merging.value_checks import LARGEST, ChangeSizes, watched

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(once: Callable[..., Path]) -> Path:
    def write(folder: Path) -> None:
        write_stock(folder, "vl", tied=False, dtype=torch.bfloat16)

    return once("value-base", write)


@pytest.fixture(scope="module")
def adapter(base: Path, once: Callable[..., Path]) -> Path:
    def write(home: Path) -> None:
        rows = write_rows(home / "rows.jsonl", conversations(12))
        run = {"max_steps": 3, "learning_rate": 1e-2, "target_groups": ("attn",)}
        start(base, rows, home / "adapter", SHORT | run | {"quantization": "none"})

    return once("value-adapter", write) / "adapter"


def scaled(adapter: Path, folder: Path, factor: float) -> Path:
    """The adapter with B times a factor, as another tool would leave it."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if "lora_B" in name:
            tensors[name] *= factor
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")
    return folder


def test_an_absurd_change_is_refused_by_its_largest_tensor(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    found = merge(str(base), adapter, tmp_path / "plain", prove=False)
    figure(f"three steps at 1e-2 change a weight by {found.largest_ratio:.3g} of its norm")
    assert 0 < found.largest_ratio < 0.5
    by_hand = ratio(base, tmp_path / "plain")
    assert found.largest_ratio == pytest.approx(by_hand, rel=1e-3)

    wrong = scaled(adapter, tmp_path / "wrong", 3 * LARGEST / found.largest_ratio)
    with pytest.raises(NumericError) as error:
        merge(str(base), wrong, tmp_path / "out", trust_base=True)
    assert (error.value.code, error.value.exit_code) == ("QC-MERGE-014", 76)
    assert "self_attn" in str(error.value.field)
    assert "--allow-large-change" in str(error.value.fix)
    assert not (tmp_path / "out").exists()
    told = merge(
        str(base), wrong, tmp_path / "told", trust_base=True, prove=False, allow_large_change=True
    )
    assert told.largest_ratio == pytest.approx(3 * LARGEST, rel=1e-2)

    near = scaled(adapter, tmp_path / "near", 0.9 * LARGEST / found.largest_ratio)
    merge(str(base), near, tmp_path / "near-merge", trust_base=True, prove=False)


def ratio(base: Path, merged: Path) -> float:
    """The largest relative change of a tensor, from the files."""
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    return max(
        float((after[name].double() - value.double()).norm() / value.double().norm())
        for name, value in before.items()
        if not torch.equal(value, after[name])
    )


def test_a_weight_of_zeros_has_no_relative_change(tmp_path: Path) -> None:
    sizes = ChangeSizes(tmp_path)
    sizes.add("zeros", 4.0, 0.0)
    sizes.close("zeros")
    sizes.add("weight", 4.0, 1.0)
    sizes.add("weight", 5.0, 3.0)
    sizes.close("weight")
    assert (sizes.largest, sizes.where) == (1.5, "weight")


def test_a_nan_that_the_base_has_is_carried_and_named(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """In a part that training does not load: it trained, and the merge copies the tensor."""
    broken = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "visual" in name and tensors[name].dim() == 2)
    tensors[name].view(-1)[7] = math.nan
    resave(broken, tensors)
    heard = Heard()
    report = merge(str(broken), adapter, tmp_path / "out", reporter=heard.reporter)
    assert report.not_finite == (name,)
    assert any(line.startswith("warning: the base holds a NaN") and name in line
               for line in heard.notes)  # fmt: skip
    assert read_manifest(tmp_path / "out").meta["not_finite"] == [name]
    again = load_file(tmp_path / "out" / "model.safetensors")[name]
    assert again.view(torch.int16).equal(tensors[name].view(torch.int16))
    plain = merge(str(base), adapter, tmp_path / "fine")
    assert plain.not_finite == ()
    assert "not_finite" not in read_manifest(tmp_path / "fine").meta
    assert json.dumps(report.as_json(), default=str)


def test_a_nan_in_a_changed_weight_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(broken / "model.safetensors")
    name = next(
        name for name in tensors if name.endswith("language_model.layers.3.self_attn.q_proj.weight")
    )
    tensors[name].view(-1)[7] = math.inf
    resave(broken, tensors)
    other = scaled(adapter, tmp_path / "foreign", 1.0)  # without hashes of its base
    with pytest.raises((NumericError, InputError)) as error:
        merge(str(broken), other, tmp_path / "out", trust_base=True)
    assert (error.value.code, error.value.field) == ("QC-LOAD-003", name)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "BF16"),
        (torch.float16, "F16"),
        (torch.float32, "F32"),
        (torch.int64, "I64"),
    ],
)
def test_bytes_pass_unchanged(dtype: torch.dtype, name: str) -> None:
    value = torch.arange(64).to(dtype)
    raw = bytearray(value.view(torch.uint8).numpy().tobytes())
    header: Any = Header(name="w", file="f", dtype=name, shape=(64,), start=0, end=len(raw))
    for poisoned in (False, True):
        if poisoned and dtype.is_floating_point:
            value[63] = math.nan
            raw = bytearray(value.view(torch.uint8).numpy().tobytes())
        half = len(raw) // 2
        chunks: Iterator[memoryview] = iter([memoryview(raw)[:half], memoryview(raw)[half:]])
        found: set[str] = set()
        assert b"".join(watched(chunks, header, found, "w")) == bytes(raw)
        assert found == ({"w"} if poisoned and dtype.is_floating_point else set())
