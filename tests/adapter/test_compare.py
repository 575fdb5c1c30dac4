"""`qcore adapter diff`: deltas as PEFT forms them, and what counts as the same adapter."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_kit import here
from support.e2e_kit import stock, wrapped, write_stock

from qcore.adapter.compare import compare_adapters
from qcore.adapter.norms import square_of_product

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stock(tmp_path_factory.mktemp("diff") / "base", "vl")


def saved(base: Path, folder: Path, seed: int, **lora: Any) -> dict[str, torch.Tensor]:
    """Save an adapter of stock PEFT with random values; its deltas by module."""
    model = wrapped(stock(base, "vl"), **lora)
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.1 * torch.randn_like(value)
    model.save_pretrained(folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.fixture(scope="module")
def two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """Two adapters of different ranks and targets, and their relative difference by PEFT."""
    a, b = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    mine = saved(base, a, 0, r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"])
    theirs = saved(base, b, 1, r=5, lora_alpha=4, use_rslora=True,
                   target_modules=["q_proj", "down_proj"])  # fmt: skip
    zero = torch.zeros(())
    norms = [
        [float((x * mine.get(name, zero) - y * theirs.get(name, zero)).norm())
         for name in mine.keys() | theirs.keys()]
        for x, y in ((1, 1), (1, 0), (0, 1))
    ]  # fmt: skip
    d, m, t = (math.hypot(*each) for each in norms)
    return a, b, d / max(m, t)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def edited(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_difference_is_that_of_pefts_deltas(two: tuple[Path, Path, float]) -> None:
    a, b, relative = two
    found = compare_adapters(a, b)
    assert found.verdict == "different"
    assert found.relative == pytest.approx(relative, rel=1e-5)
    assert {t.what for t in found.differing} == {"only in a", "only in b", "shape"}
    assert {"r", "lora_alpha", "use_rslora", "target_modules"} <= found.fields.keys()


def test_a_copy_is_identical(two: tuple[Path, Path, float], tmp_path: Path) -> None:
    copy = copied(two[0], tmp_path / "copy")
    edited(copy, base_model_name_or_path="elsewhere")
    found = compare_adapters(two[0], copy)
    assert (found.verdict, found.relative) == ("identical", 0.0)
    assert [*found.fields] == ["base_model_name_or_path"]


def test_another_factorization_is_equivalent(two: tuple[Path, Path, float], tmp_path: Path) -> None:
    copy = copied(two[0], tmp_path / "copy")
    turned, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    tensors = {
        name: (turned @ value if "lora_A" in name else value @ turned.T / 2).contiguous()
        for name, value in load_file(copy / WEIGHTS).items()
    }
    save_file(tensors, copy / WEIGHTS)
    edited(copy, lora_alpha=12)
    found = compare_adapters(two[0], copy)
    assert found.verdict == "equivalent"
    assert found.relative is not None
    assert 0 < found.relative < 1e-6


@pytest.mark.parametrize("change", ["dropped", "value", "dora", "wrapped"])
def test_what_changed_is_named(two: tuple[Path, Path, float], tmp_path: Path, change: str) -> None:
    copy = copied(two[0], tmp_path / "copy")
    tensors = load_file(copy / WEIGHTS)
    name = min(name for name in tensors if "lora_B" in name)
    expected = "different"
    if change == "dropped":
        del tensors[name]
    elif change == "value":
        tensors[name][0, 0] += 0.5
    elif change == "dora":
        edited(copy, use_dora=True)
    else:
        tensors = {key.replace(".weight", ".default.weight"): v for key, v in tensors.items()}
        expected = "identical"
    save_file(tensors, copy / WEIGHTS)
    found = compare_adapters(two[0], copy)
    assert found.verdict == expected
    if change == "value":
        (tensor,) = found.differing
        assert (tensor.name, tensor.what) == (name, "values")
        assert tensor.largest == pytest.approx(0.5, rel=1e-5)
        assert len([d for d in found.deltas if d.relative]) == 1
    if change == "dora":
        assert found.acting == ["use_dora"]


def test_experts_are_compared_one_by_one(tmp_path: Path) -> None:
    base = write_stock(tmp_path / "base", "vl", moe=True)
    for seed, name in enumerate("ab"):
        model = wrapped(stock(base, "vl", moe=True), r=2, lora_alpha=2, target_modules=[],
                        target_parameters=["mlp.experts.down_proj"])  # fmt: skip
        torch.manual_seed(seed)
        for key, value in model.named_parameters():
            if "lora_" in key:
                value.data = 0.1 * torch.randn_like(value)
        model.save_pretrained(tmp_path / name)
        deltas = [
            module.get_delta_weight("default").double()
            for module in model.modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        ]
        if name == "a":
            mine = deltas
    d, m, t = (
        math.hypot(*(float((x * one - y * other).norm()) for one, other in zip(
            mine, deltas, strict=True)))
        for x, y in ((1, 1), (1, 0), (0, 1))
    )  # fmt: skip
    found = compare_adapters(tmp_path / "a", tmp_path / "b")
    assert found.relative == pytest.approx(d / max(m, t), rel=1e-5)


def test_the_command(two: tuple[Path, Path, float], capsys: pytest.CaptureFixture[str]) -> None:
    ended = here(capsys, "adapter", "diff", two[0], two[1])
    assert (ended.code, ended.err) == (0, "")
    for word in ("different, deltas differ by", "fields that differ", "tensors that", "lora_alpha"):
        assert word in ended.out
    ended = here(capsys, "adapter", "diff", two[0], two[1], "--json")
    assert (ended.code, ended.json["verdict"]) == (0, "different")
    ended = here(capsys, "adapter", "diff", two[0], "nowhere", "--json")
    assert (ended.code, ended.json["error"]["code"]) == (65, "QC-ADAPTER-003")


def test_a_product_that_cancels_has_no_negative_square() -> None:
    """``b @ a`` is 0 up to rounding, so that its sum of squares may be below zero in float64."""
    squares = []
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(3, 17, dtype=torch.float64, generator=draw) for _ in range(2))
        side_a, side_b = torch.cat([a, a]), torch.cat([b.t(), -b.t()], 1)
        squares.append(((side_a @ side_a.T) * (side_b.T @ side_b)).sum())
        assert square_of_product(side_a, side_b) >= 0
    assert min(squares) < 0
