"""A base in block FP8: read as transformers reads it, trained on, merged into bf16 when asked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.cli_kit import here
from support.conversations import conversations, write_rows
from support.e2e_kit import (
    CPU,
    ROOT,
    documents,
    figure,
    loaded_adapter,
    our_logits,
    ours,
    stock,
    stock_logits,
    write_stock,
)
from support.fp8_kit import decoded, is_quantized, write_bf16, write_fp8
from support.moe_kit import INDEX, exact, rewrite, tensors_of
from torch import Tensor

import qcore.adapter.read_several
import qcore.merging.merge
from qcore.adapter.reader import read_adapter
from qcore.checkpoint.fingerprint import fingerprints
from qcore.config.settings import Settings
from qcore.errors import InputError, NumericError, UsageError
from qcore.io.artifact import read_manifest, verify
from qcore.merging import rewrite as merge_pass
from qcore.merging.merge import MergeReport, merge
from qcore.nn.load import load, read_tensor
from qcore.nn.model import Model
from qcore.plugins.resolve_model import identify
from qcore.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCK = (16, 16)  # transformers reads only blocks that tile the tensor; what does not: ODD
ODD = (32, 20)
MOE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


@pytest.fixture(scope="module")
def plain(once: Callable[..., Path]) -> Path:
    """The bf16 checkpoint that everything is made from, with a tower and mtp."""

    def write(folder: Path) -> None:
        write_stock(folder, "vl", tied=False, mtp=True, dtype=torch.bfloat16)
        (folder / "README.md").write_text("---\nbase_model:\n- some-org/its-base\n---\n")

    return once("fp8-plain", write)


@pytest.fixture(scope="module")
def base(plain: Path, once: Callable[..., Path]) -> Path:
    def write(home: Path) -> None:
        folder = write_fp8(plain, home / "fp8", block=BLOCK)
        (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')

    return once("fp8-base", write) / "fp8"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", conversations(12))


def trained(base: Path, rows: Path, out: Path, **settings: Any) -> Path:
    options: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "r": 4,
        "lora_alpha": 12, "learning_rate": 2e-2, "dtype": "fp32", "save_steps": 0,
    }  # fmt: skip
    train(str(base), rows, out, Settings(**(options | settings)), device="cpu")
    return out


@pytest.fixture(scope="module")
def adapter(base: Path, rows: Path, once: Callable[..., Path]) -> Path:
    return once("fp8-adapter", lambda home: trained(base, rows, home / "adapter")) / "adapter"


@pytest.fixture(scope="module")
def merged(
    base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, MergeReport]:
    out = tmp_path_factory.mktemp("merged") / "out"
    report = merge(str(base), adapter, out, dequantize=True)
    return report.output, report


def digests(folder: Path, *, quantize: bool = False) -> dict[str, str]:
    found = identify(str(folder))
    model = Model(
        found.decision.architecture, found.checkpoint.config, found.layout, torch.float32, {}
    )
    return load(model, found.layout, found.checkpoint, device=CPU, quantize=quantize)


# -- read


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
def test_read_as_transformers_reads_it(plain: Path, tmp_path: Path, scale: torch.dtype) -> None:
    """transformers decodes to bf16 where there is no GPU: the same values, and logits."""
    folder = write_fp8(plain, tmp_path / "fp8", block=BLOCK, scale_dtype=scale)
    model = stock(folder, "vl", torch.bfloat16)
    found = identify(str(folder))
    theirs = dict(model.named_parameters())
    compared = 0
    for name, item in found.layout.located.items():
        if item.places and item.places[0].scale is not None and name in theirs:
            assert torch.equal(read_tensor(found.checkpoint, item), theirs[name].data), name
            compared += 1
    assert compared == 25
    docs = documents((33, 70))
    mine = our_logits(ours(folder), docs)
    apart = float((mine - stock_logits(model.float(), docs)).abs().max())
    rounding = float((mine - our_logits(ours(plain), docs)).abs().max())
    figure(f"FP8 {scale}: {apart:.1e} off transformers; quantization moved logits {rounding:.2f}")
    assert apart <= 1e-4
    assert rounding > 0.1


@pytest.mark.parametrize("block", [BLOCK, ODD, (128, 128)])
def test_one_fingerprint_with_the_decoded_copy(plain: Path, tmp_path: Path, block: Any) -> None:
    fp8 = write_fp8(plain, tmp_path / "fp8", block=block)
    copy = write_bf16(fp8, tmp_path / "bf16", block)
    one, two = identify(str(fp8)), identify(str(copy))
    assert fingerprints(one.layout, digests(fp8)) == fingerprints(two.layout, digests(copy))
    assert one.layout.parameters == two.layout.parameters
    assert digests(plain) != digests(fp8)


def test_experts_in_every_layout_are_one_base(tmp_path: Path) -> None:
    """Published FP8 has one tensor an expert; a stack with a stack of scales is the same base."""
    stocked = write_stock(
        tmp_path / "stock", "vl", tied=False, mtp=True, moe=True, dtype=torch.bfloat16, **MOE
    )
    found = []
    for layout in ("apart", "fused", "mixed"):
        copy = rewrite(stocked, tmp_path / layout, layout)
        fp8 = write_fp8(copy, tmp_path / f"{layout}-fp8", block=(8, 8))
        found += [digests(fp8), digests(write_bf16(fp8, tmp_path / f"{layout}-bf16", (8, 8)))]
    assert all(one == found[0] for one in found)


# -- trained on, merged


@pytest.mark.slow
def test_merge_asks(base: Path, adapter: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        merge(str(base), adapter, tmp_path / "out")
    assert error.value.code == "QC-MERGE-008"
    assert "--dequantize" in str(error.value.fix)
    assert "some-org/its-base" in str(error.value.fix)
    with pytest.raises(UsageError) as usage:
        merge(str(plain), adapter, tmp_path / "out", dequantize=True)
    assert usage.value.code == "QC-MERGE-009"
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_of_the_merge(
    base: Path, adapter: Path, merged: tuple[Path, MergeReport], tmp_path: Path
) -> None:
    out, report = merged
    old, new = tensors_of(base), tensors_of(out)
    by_hand = write_bf16(base, tmp_path / "bf16", BLOCK)
    changed = exact(by_hand, adapter)
    assert len(changed) == 25
    for name, value in tensors_of(by_hand).items():
        wanted = changed[name].bfloat16() if name in changed else value
        assert new[name].dtype == wanted.dtype, name
        assert torch.equal(new[name], wanted), name
    assert new.keys() == {name for name in old if not name.endswith("_scale_inv")}
    assert not any(value.dtype == torch.float8_e4m3fn for value in new.values())
    count = sum(map(is_quantized, new))
    assert (report.decoded, report.changed, report.tensors) == (count, 25, len(new))
    assert any(name.startswith("mtp.") and is_quantized(name) for name in new)
    assert report.proof is not None
    figure(f"{count} tensors decoded; proof {dict(report.proof)}")
    assert report.proof["difference"] <= 1e-4
    assert report.proof["effect"] > 0.1


def test_the_files_of_the_merge(base: Path, merged: tuple[Path, MergeReport]) -> None:
    out, report = merged
    assert verify(out).ok
    meta = read_manifest(out).meta
    assert meta["decoded"] == {"from": "block FP8", "to": "bf16", "tensors": report.decoded}
    assert meta["model"]["quantization"]["block"] == list(BLOCK)
    names = {path.name for path in out.iterdir()}
    kept = {path.name for path in base.iterdir()} - {"hf_quant_config.json"}
    assert names == kept | {"MANIFEST.json"}
    for name in kept:
        if not name.endswith(".safetensors") and name not in ("config.json", INDEX):
            assert (out / name).read_bytes() == (base / name).read_bytes(), name
    lines = (base / "config.json").read_text().splitlines(keepends=True)
    rest = [line for line in lines if '"quantization_config"' not in line]
    assert len(rest) == len(lines) - 1
    assert (out / "config.json").read_text() == "".join(rest)
    index = json.loads((out / INDEX).read_text())
    sizes = 0
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "of": file.name}
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"][name] == file.name
        sizes += sum(value.nbytes for value in load_file(file).values())
    assert index["metadata"] == {"total_size": sizes}


def test_transformers_says_the_same(
    base: Path, adapter: Path, merged: tuple[Path, MergeReport], tmp_path: Path
) -> None:
    docs = documents((33, 70))
    theirs = stock(merged[0], "vl")
    assert not hasattr(theirs.config, "quantization_config")
    written = stock_logits(theirs, docs)
    mine = float((our_logits(ours(merged[0]), docs) - written).abs().max())
    model = stock(base, "vl", torch.bfloat16).float()
    plain = stock_logits(model, docs)
    adapted = stock_logits(loaded_adapter(stock(base, "vl", torch.bfloat16).float(), adapter), docs)
    sums = exact(write_bf16(base, tmp_path / "bf16", BLOCK), adapter)
    with torch.no_grad():
        for name, value in sums.items():
            model.get_parameter(name).copy_(value)
    unrounded = float((stock_logits(model, docs) - adapted).abs().max())
    with torch.no_grad():
        for name, value in sums.items():
            model.get_parameter(name).copy_(value.bfloat16())
    effect = float((adapted - plain).abs().max())
    figure(f"ours {mine:.1e} off transformers; unrounded {unrounded:.1e}, effect {effect:.2f}")
    assert mine <= 1e-4
    assert effect > 0.1
    assert unrounded <= 1e-4
    assert torch.equal(stock_logits(model, docs), written)


def test_the_adapter_goes_into_the_decoded_copy_too(
    base: Path, adapter: Path, merged: tuple[Path, MergeReport], tmp_path: Path
) -> None:
    copy = write_bf16(base, tmp_path / "bf16", BLOCK)
    report = merge(str(copy), adapter, tmp_path / "out")
    assert report.decoded == 0
    assert read_manifest(tmp_path / "out").meta["decoded"] is None
    one, two = tensors_of(tmp_path / "out"), tensors_of(merged[0])
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_scales_in_a_file_of_their_own(
    plain: Path, adapter: Path, merged: tuple[Path, MergeReport], tmp_path: Path
) -> None:
    base = write_fp8(plain, tmp_path / "fp8", block=BLOCK, shards=1, scales_apart=True)
    merge(str(base), adapter, tmp_path / "out", dequantize=True)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == [
        "part-0.safetensors"
    ]
    one, two = tensors_of(tmp_path / "out"), tensors_of(merged[0])
    assert all(torch.equal(one[name], two[name]) for name in two)
    again = identify(str(tmp_path / "out"))
    assert again.quantization is None


@pytest.mark.slow
@pytest.mark.parametrize("cut", [2**26, 1])
def test_experts_train_and_merge(
    rows: Path, tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per expert as published, and a stack cut to one expert at a time: the same function."""
    monkeypatch.setattr(merge_pass, "_CUT", cut)
    stocked = write_stock(
        tmp_path / "stock", "text", tied=False, moe=True, dtype=torch.bfloat16, **MOE
    )
    results = []
    for layout in ("apart", "fused"):
        copy = rewrite(stocked, tmp_path / layout, layout)
        fp8 = write_fp8(copy, tmp_path / f"{layout}-fp8", block=(8, 8))
        if not results:
            trained(fp8, rows, tmp_path / "adapter", quantization="nf4", max_steps=2)
        out = tmp_path / f"{layout}-out"
        report = merge(str(fp8), tmp_path / "adapter", out, dequantize=True)
        assert report.decoded == sum(map(is_quantized, tensors_of(out)))
        by_hand = write_bf16(fp8, tmp_path / f"{layout}-bf16", (8, 8))
        again = merge(str(by_hand), tmp_path / "adapter", tmp_path / f"{layout}-again")
        assert (again.changed, again.unchanged) == (report.changed, report.unchanged)
        one, two = tensors_of(out), tensors_of(tmp_path / f"{layout}-again")
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        results.append(our_logits(ours(out), documents((33,))))
    assert torch.equal(*results)


def test_a_tower_that_nobody_claims_is_decoded_as_well(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    name = "model.visual.blocks.0.attn.qkv.weight"
    old = tensors_of(base)[name]
    value, scale = torch.randn(old.shape).to(torch.float8_e4m3fn), torch.rand(6, 2)
    set_tensor(copy, name, value)
    set_tensor(copy, f"{name}_scale_inv", scale)
    merge(str(copy), adapter, tmp_path / "out", dequantize=True)
    found = tensors_of(tmp_path / "out")
    assert f"{name}_scale_inv" not in found
    assert torch.equal(found[name], decoded(value, scale, BLOCK))
    set_tensor(copy, f"{name}_scale_inv", scale[:5].clone())
    with pytest.raises(InputError) as error:
        merge(str(copy), adapter, tmp_path / "other", dequantize=True)
    assert (error.value.code, error.value.field) == ("QC-KEY-007", name)


# -- what is wrong


def set_tensor(folder: Path, name: str, value: Tensor) -> None:
    """Put one tensor in the place of another, or into the first file."""
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"].setdefault(name, next(iter(index["weight_map"].values())))
    found = load_file(folder / file)
    found[name] = value
    save_file(found, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "weight", [f"{ROOT}layers.1.mlp.up_proj.weight", "mtp.layers.0.mlp.up_proj.weight"]
)
def test_a_scale_that_is_not_finite(
    base: Path, adapter: Path, rows: Path, tmp_path: Path, value: float, weight: str
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    scale = tensors_of(base)[f"{weight}_scale_inv"]
    scale[1, 2] = value
    set_tensor(copy, f"{weight}_scale_inv", scale)
    with pytest.raises(NumericError, match="scale that is not finite") as error:
        merge(str(copy), adapter, tmp_path / "out", dequantize=True)
    assert (error.value.code, error.value.field) == ("QC-LOAD-003", f"{weight}_scale_inv")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    if not weight.startswith("mtp."):
        with pytest.raises(NumericError, match="scale that is not finite"):
            trained(copy, rows, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


def test_a_value_that_is_not_finite_and_that_no_pair_touches(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    name = "mtp.layers.0.mlp.up_proj.weight"
    value = tensors_of(base)[name]
    value.view(torch.uint8)[3, 4] = 0x7F  # the NaN of e4m3
    set_tensor(copy, name, value)
    with pytest.raises(NumericError) as error:
        merge(str(copy), adapter, tmp_path / "out", dequantize=True)
    assert (error.value.code, error.value.field) == ("QC-LOAD-003", name)


@pytest.mark.parametrize("kind", ["missing", "misshapen"])
def test_scales_that_do_not_fit(base: Path, rows: Path, tmp_path: Path, kind: str) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    name = f"{ROOT}layers.1.mlp.up_proj.weight"
    index = json.loads((copy / INDEX).read_text())
    file = copy / index["weight_map"][f"{name}_scale_inv"]
    found = load_file(file)
    scale = found.pop(f"{name}_scale_inv")
    if kind == "misshapen":
        found[f"{name}_scale_inv"] = scale[:, 1:].clone()
    else:
        del index["weight_map"][f"{name}_scale_inv"]
        (copy / INDEX).write_text(json.dumps(index))
    save_file(found, file)
    with pytest.raises(InputError) as error:
        trained(copy, rows, tmp_path / "adapter")
    assert (error.value.code, error.value.field) == ("QC-KEY-007", name)
    assert list(error.value.message.splitlines()) == [error.value.message]


def test_a_file_that_is_cut_after_it_was_opened(
    plain: Path, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line from load and from merge, of plain weights and of FP8, wherever it is cut."""
    weight = f"{ROOT}layers.1.mlp.up_proj.weight"
    copies = {"fp8": base, "bf16": write_bf16(base, tmp_path / "source", BLOCK)}
    cuts = [(kind, weight, share) for kind in copies for share in (None, 0.0, 0.5)]
    for kind, name, share in [*cuts, ("fp8", f"{weight}_scale_inv", 0.5)]:
        copy = tmp_path / "base"
        shutil.copytree(copies[kind], copy)
        found = identify(str(copy))
        told = read_adapter(adapter, found.layout)
        header = found.checkpoint.headers[name]
        at = 0 if share is None else header.start + int(share * (header.end - header.start))
        os.truncate(copy / header.file, at)
        config = found.checkpoint.config
        model = Model(found.decision.architecture, config, found.layout, torch.float32, {})
        with pytest.raises(InputError) as error:
            load(model, found.layout, found.checkpoint, device=CPU, quantize=False)
        assert error.value.code == "QC-CKPT-005"
        monkeypatch.setattr(qcore.merging.merge, "identify", lambda *a, f=found, **k: f)
        monkeypatch.setattr(qcore.adapter.read_several, "read_for", lambda *a, t=told, **k: t)
        with pytest.raises(InputError) as error:
            merge(str(copy), adapter, tmp_path / "out", dequantize=kind == "fp8")
        assert error.value.code == "QC-CKPT-005"
        assert not (tmp_path / "out").exists()
        shutil.rmtree(copy)


# -- the command line


def test_the_command_line(base: Path, plain: Path, adapter: Path, tmp_path: Path, capsys: Any):
    common = ("merge", "--model", base, "--adapter", adapter, "--output", tmp_path / "out")
    ended = here(capsys, *common)
    assert (ended.code, "--dequantize" in ended.error("QC-MERGE-008")) == (65, True)
    other = ("merge", "--model", plain, "--adapter", adapter, "--output", tmp_path / "out")
    ended = here(capsys, *other, "--dequantize")
    assert ended.code == 2
    ended.error("QC-MERGE-009")
    ended = here(capsys, *common, "--dequantize")
    assert ended.code == 0, ended.err
    assert "the output is in 16 bits: 32 tensors of the base were quantized" in ended.out
    assert "32 weights in block FP8 of 16 x 16" in ended.err
    told = here(capsys, "inspect", base, "--json").json
    assert told["quantisation"]["format"] == "block FP8"
    assert told["quantisation"]["block"] == list(BLOCK)
    assert told["quantisation"]["readable"] is True
    assert told["unaccounted"] == []
    ended = here(capsys, "inspect", base)
    assert ended.code == 0
    assert "  quantized   32 weights in block FP8 of 16 x 16" in ended.out
    assert "every tensor is accounted for" in ended.out
