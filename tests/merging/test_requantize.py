"""Changed weights written back to block FP8: scales, values and errors against the definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.change_kit import written
from support.cli_kit import here
from support.e2e_kit import LENGTHS, LINEARS, documents, our_logits, ours, stock, write_stock
from support.four_bit_kit import write_four_bit
from support.fp8_kit import decoded, is_quantized, spread, to_fp8, write_bf16, write_fp8
from support.moe_kit import exact, rewrite, tensors_of
from support.tiers import fast
from torch import Tensor

from qcore.adapter.evidence import read_for
from qcore.errors import InputError, NumericError, UsageError
from qcore.io.artifact import read_manifest
from qcore.merging import disk_rows
from qcore.merging import rewrite as merge_pass
from qcore.merging.merge import merge
from qcore.merging.requantize import is_near, is_requantized
from qcore.nn.load import read_tensor
from qcore.plugins.resolve_model import identify

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = (16, 16)


@pytest.fixture(scope="module")
def plain(once: Callable[..., Path]) -> Path:
    return once(
        "requantized-plain",
        lambda home: write_stock(home, "vl", tied=False, mtp=True, dtype=torch.bfloat16),
    )


@pytest.fixture(scope="module")
def adapter(plain: Path, once: Callable[..., Path]) -> Path:
    recipe = {"target_modules": list(LINEARS)}
    return once("requantized-adapter", lambda home: written(plain, home / "a", recipe)) / "a"


def assert_rounded(value: Tensor, scale: Tensor, exact: Tensor, block: Any) -> None:
    """The scales are those of the blocks, and each value is the nearest 8-bit float."""
    _, wanted = to_fp8(exact.float(), block, scale.dtype)
    assert scale.dtype == wanted.dtype
    assert torch.allclose(scale.float(), wanted.float(), rtol=2e-6 if scale.dtype == torch.float32
                          else 2**-7)  # fmt: skip
    own = spread(scale, block, exact)
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = torch.cat([-grid.flip(0), grid])
    nearest = (exact.float()[..., None] / own[..., None] - grid).abs().min(-1).values
    mine = (exact.float() / own - value.float()).abs()
    assert bool((mine <= nearest * (1 + 1e-3) + 1e-5).all())


@pytest.mark.parametrize("scale_dtype", fast([torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("block", fast([(32, 20), BLOCK, (128, 128)]))
def test_every_tensor(
    plain: Path, adapter: Path, tmp_path: Path, block: Any, scale_dtype: torch.dtype
) -> None:
    base = write_fp8(plain, tmp_path / "base", block=block, scale_dtype=scale_dtype)
    out = tmp_path / "out"
    report = merge(str(base), adapter, out, trust_base=True, requantize=True)
    sums = exact(write_bf16(base, tmp_path / "bf16", block), adapter)
    before, after = tensors_of(base), tensors_of(out)
    assert list(after) == list(before)
    assert report.requantized.keys() == sums.keys()
    for name, value in after.items():
        weight = name.removesuffix("_scale_inv")
        if weight not in sums:
            assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8)), name
        elif name == weight:
            scale = after[f"{name}_scale_inv"]
            assert_rounded(value, scale, sums[name], block)
            apart = (value.float() * spread(scale, block, value)).double() - sums[name].double()
            told = report.requantized[name]
            share = float(apart.norm() / sums[name].double().norm())
            assert told["of_weight"] == pytest.approx(share, rel=1e-3)
            assert told["largest"] == pytest.approx(float(apart.abs().max()), rel=1e-3)
            assert 0.005 < told["of_weight"] < 0.05
    for name in ("config.json", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert (report.decoded, report.changed) == (0, 25)
    assert read_manifest(out).meta["requantized"] == report.requantized
    assert report.proof is not None
    assert report.proof["difference"] <= 1e-4


@pytest.mark.slow
def test_transformers_decodes_the_same(plain: Path, adapter: Path, tmp_path: Path) -> None:
    base = write_fp8(plain, tmp_path / "base", block=BLOCK, scale_dtype=torch.bfloat16)
    merge(str(base), adapter, tmp_path / "out", trust_base=True, requantize=True)
    theirs = dict(stock(tmp_path / "out", "vl", torch.bfloat16).named_parameters())
    found = identify(str(tmp_path / "out"))
    compared = 0
    for name, item in found.layout.located.items():
        if item.places and item.places[0].scale is not None and name in theirs:
            assert torch.equal(read_tensor(found.checkpoint, item), theirs[name].data), name
            compared += 1
    assert compared == 25
    merge(str(base), adapter, tmp_path / "bf16", trust_base=True, dequantize=True)
    docs = documents(LENGTHS)
    plain_logits, merged, again = (
        our_logits(ours(folder), docs) for folder in (base, tmp_path / "bf16", tmp_path / "out")
    )
    assert float((again - merged).norm()) < 0.5 * float((merged - plain_logits).norm())


@pytest.mark.parametrize("layout", fast(["fused", "apart"]))
@pytest.mark.parametrize("cut", fast([1, 2**26]))
def test_experts(tmp_path: Path, layout: str, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_pass, "_CUT", cut)
    stocked = write_stock(
        tmp_path / "stock", "text", tied=False, moe=True, dtype=torch.bfloat16,
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    base = write_fp8(rewrite(stocked, tmp_path / "copy", layout), tmp_path / "base", block=(8, 8))
    folder, found = tmp_path / "a", identify(str(base))
    tensors = {}
    entry = next(e for e in found.layout.table if e.name.endswith("0.mlp.experts.down_proj"))
    experts, rows, columns = entry.shape
    generator = torch.Generator().manual_seed(1)
    for layer in range(2):
        root = f"base_model.model.model.layers.{layer}.mlp.experts"
        a = torch.randn(experts * 2, columns, generator=generator)
        b = torch.randn(rows, experts * 2, generator=generator)
        tensors |= {f"{root}.lora_A.weight": 0.1 * a, f"{root}.lora_B.weight": 0.1 * b}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [], '
        '"target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.21.2"}'
    )
    read_for(found, folder, trust_base=True)
    report = merge(str(base), folder, tmp_path / "out", trust_base=True, requantize=True)
    whole = merge(str(base), folder, tmp_path / "bf16", trust_base=True, dequantize=True)
    sums, after, before = (tensors_of(p) for p in (whole.output, report.output, base))
    for name in report.requantized:
        value = decoded(after[name], after[f"{name}_scale_inv"], (8, 8))
        apart = (value.float() - sums[name].float()).abs()
        assert bool((apart <= sums[name].float().abs() * 0.08 + 1e-4).all())
    same = [n for n in before if n.removesuffix("_scale_inv") not in report.requantized]
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in same)
    assert len(report.requantized) == 2 * (1 if layout == "fused" else experts)


@pytest.mark.slow
def test_scales_that_are_written_before_their_weights(
    plain: Path, adapter: Path, tmp_path: Path
) -> None:
    one = write_fp8(plain, tmp_path / "one", block=BLOCK, shards=1, scales_apart=True)
    two = write_fp8(plain, tmp_path / "two", block=BLOCK)
    first = merge(str(one), adapter, tmp_path / "a", trust_base=True, requantize=True)
    second = merge(str(two), adapter, tmp_path / "b", trust_base=True, requantize=True)
    mine, other = tensors_of(first.output), tensors_of(second.output)
    assert all(torch.equal(mine[n].view(torch.uint8), other[n].view(torch.uint8)) for n in other)
    assert first.requantized == second.requantized


@pytest.mark.parametrize("rows", [24, 8])
def test_no_range_of_rows_cuts_a_block(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """In a cut block only nearness can be compared, as its scale needs all of its values."""
    monkeypatch.setattr(disk_rows, "_BLOCK", rows)
    found = identify(str(write_fp8(plain, tmp_path / "base", block=BLOCK)))
    item = next(i for i in found.layout.located.values() if i.places and i.places[0].scale)
    (place,) = item.places
    total, half = item.tensor.shape[0], item.tensor.shape[0] // 2 - 4
    parts = [slice(0, half), slice(half, total)]  # the second begins within a multiple of 16
    pieces = tuple(place._replace(region=(part, place.region[1])) for part in parts)
    for located, starts in ((item, (0,)), (replace(item, places=pieces), (0, half))):
        slices = [*disk_rows.row_slices(located)]
        assert [each.start for each in slices[1:]] == [each.stop for each in slices[:-1]]
        assert (slices[0].start, slices[-1].stop) == (0, total)
        for each in slices:
            start = max(start for start in starts if start <= each.start)
            assert (each.start - start) % BLOCK[0] == 0


def test_a_wrong_rounding_is_caught(
    plain: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are compared with the sum, not with the code that rounds it."""
    base = write_fp8(plain, tmp_path / "base", block=BLOCK)
    real = merge_pass.requantize
    monkeypatch.setattr(
        merge_pass, "requantize", lambda *a: (r := real(*a))._replace(scales=r.scales * 1.25)
    )
    with pytest.raises(NumericError) as error:
        merge(str(base), adapter, tmp_path / "out", trust_base=True, requantize=True)
    assert error.value.code == "QC-MERGE-007"
    assert not (tmp_path / "out").exists()


def test_the_bound_accepts_every_rounding() -> None:
    exact = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    for scale_dtype in (torch.float32, torch.bfloat16):
        value, scale = to_fp8(exact, (128, 128), scale_dtype)
        assert is_requantized(decoded(value, scale, (128, 128)), exact, (128, 128), scale.dtype)
    assert not is_requantized(exact * 1.1, exact, (128, 128), torch.float32)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_the_values_of_the_base_are_not_taken_for_the_sum(scale_dtype: torch.dtype) -> None:
    """A change of LoRA's size moves values by less than the steps of FP8."""
    draw = torch.Generator().manual_seed(0)
    value, scale = to_fp8(torch.randn(256, 384, generator=draw), BLOCK, scale_dtype)
    base = decoded(value, scale, BLOCK)
    exact = base.float() * (1 + 0.01 * torch.randn(base.shape, generator=draw).clamp(-2, 2))
    assert is_near(base, exact)
    assert not is_requantized(base, exact, BLOCK, scale_dtype)
    again, scales = to_fp8(exact, BLOCK, scale_dtype)
    right = decoded(again, scales, BLOCK)
    assert is_requantized(right, exact, BLOCK, scale_dtype)
    right[:16] = base[:16]  # some rows of the base
    assert not is_requantized(right, exact, BLOCK, scale_dtype)


def test_options_without_effect(plain: Path, adapter: Path, tmp_path: Path) -> None:
    fp8 = write_fp8(plain, tmp_path / "fp8", block=BLOCK)
    four = write_four_bit(plain, tmp_path / "four")
    for base, more in ((plain, {}), (fp8, {"dequantize": True}), (four, {})):
        with pytest.raises(UsageError) as error:
            merge(str(base), adapter, tmp_path / "out", trust_base=True, requantize=True, **more)
        assert error.value.code == "QC-MERGE-009"
    written(plain, tmp_path / "a", {"target_modules": ["in_proj_a"]})
    with pytest.raises(UsageError, match="changes no weight in FP8") as error:
        merge(str(fp8), tmp_path / "a", tmp_path / "out", trust_base=True, requantize=True)
    assert error.value.code == "QC-MERGE-009"
    with pytest.raises(InputError) as refused:
        merge(str(fp8), adapter, tmp_path / "out", trust_base=True)
    assert "--requantize" in str(refused.value.fix)


@pytest.mark.slow
def test_the_command_line(plain: Path, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    base = write_fp8(plain, tmp_path / "base", block=BLOCK)
    ended = here(
        capsys, "merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "out",
        "--trust-base", "--requantize",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "25 weights in FP8 have new scales" in ended.out
    assert all(map(is_quantized, read_manifest(tmp_path / "out").meta["requantized"]))
