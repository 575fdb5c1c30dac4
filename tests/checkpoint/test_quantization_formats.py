"""Formats of quantized weights told from headers; what config.json may say beside them; FP8."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.cli_kit import here
from support.e2e_kit import figure
from support.fp8_kit import decoded, is_quantized, to_fp8
from support.model_kit import TEXT, key_list, small_config, small_shapes, write_json
from support.sku_kit import config_of, derived, shapes_of, write_sku
from support.tiers import fast
from transformers.integrations import finegrained_fp8
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from qcore.api.parameters import EXPERTS, LINEAR, Aim, Part, Row, Table, cat, stack
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import locate
from qcore.checkpoint.quantization_formats import (
    READABLE,
    Format,
    Quantization,
    detect_quantization,
)
from qcore.errors import InputError
from qcore.merging.plan import plan_merge, without
from qcore.nn import fp8
from qcore.nn.fp8 import dequantize
from qcore.nn.load import read_tensor
from qcore.plugins.resolve_model import identify
from qcore.testing import write_sparse_checkpoint

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name

MAPS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight",
        "up_proj.weight", "down_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight",
        "out_proj.weight")  # fmt: skip


def block_fp8(name: str, rows: int, columns: int) -> Tensors:
    return {
        name: ("F8_E4M3", (rows, columns)),
        f"{name}_scale_inv": ("F32", (-(-rows // 128), -(-columns // 128))),
    }


def e5m2(name: str, rows: int, columns: int) -> Tensors:
    return block_fp8(name, rows, columns) | {name: ("F8_E5M2", (rows, columns))}


def exponents(name: str, rows: int, columns: int) -> Tensors:
    return {name: ("F8_E4M3", (rows, columns)), f"{name}_scale_inv": ("F8_E8M0", (1, 1))}


def static(name: str, rows: int, columns: int) -> Tensors:
    scale = f"{name.removesuffix('weight')}activation_scale"
    return block_fp8(name, rows, columns) | {scale: ("F32", ())}


def tensor_fp8(name: str, rows: int, columns: int) -> Tensors:
    """ModelOpt's: a scale a tensor, and one of its input."""
    return {
        name: ("F8_E4M3", (rows, columns)),
        f"{name}_scale": ("F32", ()),
        f"{name.removesuffix('weight')}input_scale": ("F32", ()),
    }


def scalar_fp8(name: str, rows: int, columns: int) -> Tensors:
    """transformers' without blocks."""
    return {name: ("F8_E4M3", (rows, columns)), f"{name}_scale_inv": ("F32", ())}


def channel_fp8(name: str, rows: int, columns: int) -> Tensors:
    """FBGEMM's and compressed-tensors': a scale a row."""
    return {name: ("F8_E4M3", (rows, columns)), f"{name}_scale": ("F32", (rows, 1))}


def nvfp4(name: str, rows: int, columns: int) -> Tensors:
    return {
        name: ("U8", (rows, columns // 2)),
        f"{name}_scale": ("F8_E4M3", (rows, columns // 16)),
        f"{name}_scale_2": ("F32", ()),
        f"{name.removesuffix('weight')}input_scale": ("F32", ()),
    }


def mxfp4(name: str, rows: int, columns: int) -> Tensors:
    return {name: ("U8", (rows, columns // 2)), f"{name}_scale": ("U8", (rows, columns // 32))}


def gptq(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": ("I32", (columns // 8, rows)),
        f"{stem}qzeros": ("I32", (1, rows // 8)),
        f"{stem}scales": ("F16", (1, rows)),
        f"{stem}g_idx": ("I32", (columns,)),
    }


def gptq_without_order(name: str, rows: int, columns: int) -> Tensors:
    found = gptq(name, rows, columns)
    del found[f"{name.removesuffix('weight')}g_idx"]
    return found


def awq(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": ("I32", (columns, rows // 8)),
        f"{stem}qzeros": ("I32", (1, rows // 8)),
        f"{stem}scales": ("F16", (1, rows)),
    }


def bnb4(name: str, rows: int, columns: int) -> Tensors:
    return {
        name: ("U8", (rows * columns // 2, 1)),
        f"{name}.absmax": ("U8", (rows * columns // 64,)),
        f"{name}.nested_absmax": ("F32", (1,)),
        f"{name}.nested_quant_map": ("F32", (256,)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.quant_state.bitsandbytes__nf4": ("U8", (90,)),
    }


def bnb4_stateless(name: str, rows: int, columns: int) -> Tensors:
    """As older versions saved it: without a state nothing can be decoded."""
    found = bnb4(name, rows, columns)
    del found[f"{name}.quant_state.bitsandbytes__nf4"]
    return found


def bnb8(name: str, rows: int, columns: int) -> Tensors:
    stem = name.removesuffix("weight")
    return {
        name: ("I8", (rows, columns)),
        f"{stem}SCB": ("F32", (rows,)),
        f"{stem}weight_format": ("U8", ()),
    }


def packed(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}_packed": ("I32", (rows, columns // 8)),
        f"{name}_scale": ("BF16", (rows, 1)),
        f"{name}_shape": ("I64", (2,)),
    }


def packed_nvfp4(name: str, rows: int, columns: int) -> Tensors:
    return {
        f"{name}_packed": ("U8", (rows, columns // 2)),
        f"{name}_scale": ("F8_E4M3", (rows, columns // 16)),
        f"{name}_global_scale": ("F32", (1,)),
    }


def int8(name: str, rows: int, columns: int) -> Tensors:
    return {name: ("I8", (rows, columns)), f"{name}_scale": ("BF16", (rows, 1))}


def int4(name: str, rows: int, columns: int) -> Tensors:
    return {name: ("U8", (rows // 2, columns)), f"{name}_scale": ("F32", (rows, 1))}


FORMATS: dict[str, tuple[Callable[[str, int, int], Tensors], Format, str]] = {
    "block FP8": (block_fp8, Format.BLOCK_FP8, "fp8"),
    "e5m2": (e5m2, Format.E5M2, "fp8"),
    "E8M0": (exponents, Format.EXPONENTS, "fp8"),
    "static": (static, Format.STATIC_FP8, "fp8"),
    "per tensor, modelopt": (tensor_fp8, Format.TENSOR_FP8, "modelopt"),
    "per tensor, transformers": (scalar_fp8, Format.TENSOR_FP8, "fp8"),
    "per row": (channel_fp8, Format.TENSOR_FP8, "fbgemm_fp8"),
    "NVFP4": (nvfp4, Format.NVFP4, "modelopt"),
    "MXFP4": (mxfp4, Format.MXFP4, "mxfp4"),
    "GPTQ": (gptq, Format.GPTQ, "gptq"),
    "GPTQ without g_idx": (gptq_without_order, Format.GPTQ, "auto-round"),
    "AWQ": (awq, Format.AWQ, "awq"),
    "bitsandbytes 4 bit": (bnb4, Format.FOUR_BIT, "bitsandbytes"),
    "bitsandbytes 4 bit without states": (bnb4_stateless, Format.BITSANDBYTES, "bitsandbytes"),
    "bitsandbytes 8 bit": (bnb8, Format.BITSANDBYTES, "bitsandbytes"),
    "compressed-tensors": (packed, Format.COMPRESSED, "compressed-tensors"),
    "compressed-tensors, NVFP4": (packed_nvfp4, Format.COMPRESSED, "compressed-tensors"),
    "compressed-tensors, int8": (int8, Format.COMPRESSED, "compressed-tensors"),
    "modelopt, int4": (int4, Format.INTEGERS, "modelopt"),
}


def checkpoint(tensors: Tensors, config: Mapping[str, Any], folder: Path) -> Checkpoint:
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    write_sparse_checkpoint(folder, config, shapes, dtype=lambda name: tensors[name][0])
    return Checkpoint.open(folder)


def quantized(
    make: Callable[[str, int, int], Tensors], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensors, int]:
    """The maps of a model in a format, all else in bf16; and how many maps there are."""
    found: Tensors = {}
    count = 0
    for name, shape in shapes.items():
        if name.endswith(MAPS):
            found |= make(name, *shape)
            count += 1
        else:
            found[name] = ("BF16", shape)
    return found, count


def section(method: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method} | more}


# -- the files


@pytest.mark.parametrize("case", FORMATS)
def test_a_format_by_its_tensors(tmp_path: Path, case: str) -> None:
    make, kind, method = FORMATS[case]
    tensors, count = quantized(make, small_shapes())
    said = small_config() | section(method)
    for number, config in enumerate((said, small_config())):  # with the witness, and without
        found = detect_quantization(checkpoint(tensors, config, tmp_path / str(number)))
        assert found is not None
        assert dict(found.formats) == {kind: count}
        assert found.readable == (kind in READABLE)
        assert f"{count} weights in {kind.value}" in found.line()


def test_plain_weights(tmp_path: Path) -> None:
    tensors: Tensors = {name: ("BF16", shape) for name, shape in small_shapes().items()}
    tensors["model.language_model.ids"] = ("I64", (4,))
    assert detect_quantization(checkpoint(tensors, small_config(), tmp_path)) is None


def test_the_published_mixture(shared: Path, tmp_path: Path) -> None:
    """NVFP4 beside per-tensor FP8, as the published config names them, layer by layer."""
    folder = shared / "skus/qwen3.6/nvidia--Qwen3.6-27B-NVFP4"
    config = json.loads((folder / "config.json").read_text())
    told = json.loads((folder / "hf_quant_config.json").read_text())
    layers = told["quantization"]["quantized_layers"]
    shapes = key_list(shared / "skus/qwen3.6/Qwen3.6-27B/weight_keys.txt")
    tensors: Tensors = {}
    for name, shape in shapes.items():
        way = layers.get(name.removesuffix(".weight"), {}).get("quant_algo")
        make = {"FP8": tensor_fp8, "W4A16_NVFP4": nvfp4}.get(way)
        tensors |= make(name, *shape) if make else {name: ("BF16", shape)}
    write_json(tmp_path / "hf_quant_config.json", told)
    found = detect_quantization(checkpoint(tensors, config, tmp_path))
    assert found is not None
    assert dict(found.formats) == {Format.TENSOR_FP8: 208, Format.NVFP4: 193}
    assert found.name == "per-tensor FP8 and NVFP4"
    assert not found.readable


def test_experts_of_the_published_config(shared: Path, tmp_path: Path) -> None:
    folder = shared / "skus/qwen3.5/nvidia--Qwen3.5-122B-A10B-NVFP4"
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "hf_quant_config.json").write_bytes((folder / "hf_quant_config.json").read_bytes())
    tensors: Tensors = {}
    for number in range(20):
        at = f"model.language_model.layers.0.mlp.experts.{number}"
        for leaf, shape in (("gate", (1024, 3072)), ("down", (3072, 1024))):
            tensors |= nvfp4(f"{at}.{leaf}_proj.weight", *shape)
    found = detect_quantization(checkpoint(tensors, config, tmp_path))
    assert found is not None
    assert dict(found.formats) == {Format.NVFP4: 40}


# -- the second witness

BF16 = "plain"
CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "fp8, and nothing is": (BF16, section("fp8"), "quant_method", "no tensor is quantized"),
    "bitsandbytes, and nothing is": (
        BF16, section("bitsandbytes", load_in_4bit=True), "quant_method", "found bitsandbytes"
    ),
    "not a mapping": (BF16, {"quantization_config": "fp8"}, "quantization_config", "found 'fp8'"),
    "gptq, and AWQ is": ("AWQ", section("gptq"), "quant_method", "expected AWQ"),
    "awq, and GPTQ is": ("GPTQ", section("awq"), "quant_method", "expected GPTQ"),
    "fp8, and NVFP4 is": ("NVFP4", section("fp8"), "quant_method", "expected NVFP4"),
    "NVFP4, and FP8 is": (
        "block FP8", section("modelopt", quant_algo="NVFP4"), "quant_algo", "expected block FP8"
    ),
    "in the text section": (
        BF16, {"text_config": TEXT | section("fp8")},
        "text_config.quantization_config.quant_method", "found fp8",
    ),
    "one block size": (
        "block FP8", section("fp8", weight_block_size=[128]), "weight_block_size", "found [128]"
    ),
    "no block size": (
        "block FP8", section("fp8", weight_block_size=None), "weight_block_size", "found None"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction(tmp_path: Path, case: str, capsys: Any) -> None:
    files, config, field, says = CONTRADICTIONS[case]
    tensors: Tensors = {name: ("BF16", shape) for name, shape in small_shapes().items()}
    if files != BF16:
        tensors, _ = quantized(FORMATS[files][0], small_shapes())
    with pytest.raises(InputError) as error:
        detect_quantization(checkpoint(tensors, small_config() | config, tmp_path))
    assert error.value.code == "QC-CKPT-010"
    assert field in str(error.value.field)
    assert says in error.value.message
    assert error.value.fix
    assert "\n" not in error.value.message


def test_a_contradiction_of_the_other_file(tmp_path: Path) -> None:
    tensors, _ = quantized(block_fp8, small_shapes())
    write_json(tmp_path / "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}})
    with pytest.raises(InputError, match=r"hf_quant_config.json: .*found NVFP4") as error:
        detect_quantization(checkpoint(tensors, small_config() | section("fp8"), tmp_path))
    assert error.value.code == "QC-CKPT-010"


def test_a_method_that_is_unknown_here(tmp_path: Path) -> None:
    tensors, _ = quantized(lambda name, *shape: {f"{name}_W_q": ("U8", shape)}, small_shapes())
    found = detect_quantization(checkpoint(tensors, small_config() | section("hqq"), tmp_path))
    assert found is not None
    assert list(found.formats) == [Format.OTHER]
    assert not found.readable


@pytest.mark.parametrize(
    ("card", "config", "base"),
    [
        ("---\nlicense: x\nbase_model: a-b/C.d-1\n---\n", {}, "a-b/C.d-1"),
        ("---\nbase_model:\n  - a/b\n  - c/d\n---\n", {}, "a/b"),
        ("---\nbase_model:\n- 'a/b'\n---\n", section("gptq", base_model="c/d"), "c/d"),
        ("base_model: a/b\n", {}, None),
        ("---\nlicense: x\n---\nbase_model: a/b\n", {}, None),
        ("---\nbase_model: /etc/passwd and more\n---\n", {}, None),
        ("", {}, None),
    ],
)
def test_what_it_was_made_from(
    tmp_path: Path, card: str, config: dict[str, Any], base: str | None
) -> None:
    tensors, _ = quantized(gptq, small_shapes())
    (tmp_path / "README.md").write_text(card)
    opened = checkpoint(tensors, small_config() | config, tmp_path)
    found = detect_quantization(opened)
    assert isinstance(found, Quantization)
    assert found.base == base
    fix = found.refusal(opened).fix
    assert fix is not None
    assert "bf16 checkpoint that it was made from" in fix
    assert base is None or base in fix


# -- the verbs

UNREADABLE = [case for case, (_, kind, _) in FORMATS.items() if kind not in READABLE]


@pytest.mark.parametrize("case", fast(UNREADABLE, *UNREADABLE[::5]))
def test_inspect_names_the_format(tmp_path: Path, case: str, capsys: Any) -> None:
    """And not the hundreds of tensors that no table knows."""
    make, kind, method = FORMATS[case]
    tensors, count = quantized(make, small_shapes())
    checkpoint(tensors, small_config() | section(method), tmp_path)
    ended = here(capsys, "inspect", tmp_path)
    assert ended.code == 65
    assert f"  quantized   {count} weights in {kind.value}" in ended.out
    assert "accounted" not in ended.out
    assert len(ended.out.splitlines()) < 20
    (line,) = ended.err.splitlines()
    assert line.startswith("error[QC-CKPT-008]")
    told = here(capsys, "inspect", tmp_path, "--json").json
    assert told["quantisation"]["weights"] == {kind.value: count}
    assert told["quantisation"]["readable"] is False
    assert told["unaccounted"] == told["differences"] == []
    assert told["parameters"] is None


def test_inspect_of_plain_weights(tmp_path: Path, capsys: Any) -> None:
    write_sparse_checkpoint(tmp_path, small_config(), small_shapes())
    told = here(capsys, "inspect", tmp_path, "--json").json
    assert told["quantisation"] is None
    assert told["parameters"] > 0


@pytest.mark.parametrize("verb", ["train", "generate"])
def test_a_verb_says_what_to_use_instead(tmp_path: Path, verb: str, capsys: Any) -> None:
    tensors, count = quantized(gptq, small_shapes())
    base, out = tmp_path / "base", tmp_path / "out"
    checkpoint(tensors, small_config() | section("gptq"), base)
    (base / "README.md").write_text("---\nbase_model: some-org/its-base\n---\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    more = {
        "train": ("--data", rows, "--output", out, "--device", "cpu"),
        "generate": ("--prompt", "x", "--device", "cpu"),
    }[verb]
    model = (base,) if verb == "generate" else ("--model", base)
    ended = here(capsys, verb, *model, *more)
    line = ended.error("QC-CKPT-008")
    assert ended.code == 65
    assert f"found {count} x GPTQ" in line
    assert "Fix: name some-org/its-base, the bf16 checkpoint that it was made from" in line
    assert not out.exists()


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, qcore.merging.plan, qcore.checkpoint.quantization_formats;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# -- block FP8


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(128, 128), (256, 384), (130, 257), (1, 300), (127, 1), (3, 200, 150), (2, 3, 7, 5)]
)
@pytest.mark.parametrize("block", [(128, 128), (16, 48), (1, 128)])
def test_decoded_as_transformers_does(
    shape: tuple[int, ...], block: tuple[int, int], scale: torch.dtype
) -> None:
    """Its backward, in float32, takes any size; its loading only what blocks tile."""
    generator = torch.Generator().manual_seed(1)
    weight, scales = to_fp8(torch.randn(shape, generator=generator), block, scale)
    mine = dequantize(weight, scales, block, torch.bfloat16)
    if hasattr(finegrained_fp8, "_dequantize_fp8_weight"):  # not in transformers 5.17
        theirs = finegrained_fp8._dequantize_fp8_weight(
            weight, scales.float(), list(block), torch.float32
        )
        assert torch.equal(mine, theirs.bfloat16())
    assert torch.equal(mine, decoded(weight, scales, block))
    if shape[-2] % block[0] == 0 and shape[-1] % block[1] == 0:
        loaded = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
        assert torch.equal(mine, loaded)


def test_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scales = to_fp8(torch.randn(2, 75, 33), (8, 16))
    whole = dequantize(weight, scales, (8, 16), torch.bfloat16)
    for piece in (1, 300, 700):
        monkeypatch.setattr(fp8, "_PIECE", piece)
        assert torch.equal(dequantize(weight, scales, (8, 16), torch.bfloat16), whole)


def test_rows_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a matrix any rows; of a stack, fused or one by one, some experts and no others."""
    block = (4, 8)
    weights = {"matrix.weight": torch.randn(11, 21), "m.stack": torch.randn(5, 6, 9)}
    weights |= {f"e.{n}.{leaf}.weight": torch.randn(3, 9) for n in range(5) for leaf in "gu"}
    tensors, whole = {}, {}
    for name, value in weights.items():
        tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(value, block)
        whole[name] = decoded(tensors[name], tensors[f"{name}_scale_inv"], block)
    whole["m.one"] = torch.stack(
        [torch.cat([whole[f"e.{n}.{leaf}.weight"] for leaf in "gu"]) for n in range(5)]
    )
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "x"} | section("fp8", weight_block_size=list(block))
    write_json(tmp_path / "config.json", config)
    apart = stack("expert", cat("e.{expert}.g.weight", "e.{expert}.u.weight"))
    rows = (
        Row("matrix.weight", "eleven twentyone", "g", kind=LINEAR),
        Row("m.stack", "experts six nine", "g", kind=EXPERTS),
        Row("m.one", "experts six nine", "g", kind=EXPERTS, also=apart),
    )
    dims = {"eleven": 11, "twentyone": 21, "experts": 5, "six": 6, "nine": 9}
    part = Part(name="text", owner="test", rows=rows, dims=dims, groups={"g": Aim.ON},
                axes={"expert": tuple(range(5))})  # fmt: skip
    opened = Checkpoint.open(tmp_path)
    layout = locate(Table([part]), opened)
    sizes: list[int] = []
    monkeypatch.setattr(
        "qcore.nn.load.dequantize",
        lambda w, *rest: (sizes.append(w.numel()), dequantize(w, *rest))[1],
    )
    for name in ("matrix.weight", "m.stack", "m.one"):
        item = layout.located[name]
        assert item.dtype == "BF16"
        count = item.tensor.shape[0]
        for start in range(count):
            for stop in range(start + 1, count + 1):
                sizes.clear()
                got = read_tensor(opened, item, slice(start, stop))
                assert torch.equal(got, whole[name][start:stop]), (name, start, stop)
                most = (stop - start + block[0] - 1) if name == "matrix.weight" else stop - start
                assert sum(sizes) <= most * item.tensor.numel // count


# -- what a merge would write


def test_wider_values_come_first(tmp_path: Path) -> None:
    """Else an odd number of bytes before it would leave bfloat16 where torch cannot see it."""
    tensors: Tensors = {
        "a.weight": ("F8_E4M3", (3, 5)),
        "a.weight_scale_inv": ("F32", (1, 1)),
        "mask": ("U8", (7,)),
        "norm": ("BF16", (3,)),
        "b.weight": ("F8_E4M3", (1, 3)),
        "b.weight_scale_inv": ("BF16", (1, 1)),
        "scalar": ("F32", ()),
    }
    opened = checkpoint(tensors, {"model_type": "x"} | section("fp8"), tmp_path)
    plan = plan_merge(opened, detect_quantization(opened))
    (shard,) = plan.shards.values()
    order = [patch.written for patch in shard.patches]
    assert [header.name for header in order] == ["scalar", "a.weight", "norm", "b.weight", "mask"]
    assert [header.end - header.start for header in order] == [4, 30, 6, 6, 7]
    assert order[0].start == len(shard.head)
    assert len(shard.head) % 8 == 0
    assert all(one.end == two.start for one, two in itertools.pairwise(order))
    assert (plan.size, plan.decoded) == (53, 2)


def test_headers_are_grouped_once(tmp_path: Path) -> None:
    """Time is linear in tensors, not tensors by files."""
    shapes = {f"model.layers.{n}.weight": (2, 2) for n in range(3000)}
    write_sparse_checkpoint(tmp_path, {"model_type": "x"}, shapes, shards=300)
    opened = Checkpoint.open(tmp_path)
    looked = 0

    class Counting(dict[str, Any]):
        def values(self) -> Any:
            nonlocal looked
            looked += len(self)
            return super().values()

    opened.headers = Counting(opened.headers)
    plan = plan_merge(opened)
    assert looked == len(shapes)
    assert sum(1 for _ in plan.patches()) == len(shapes)
    assert len(plan.shards) == 300


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('{"a": 1, "k": {"k": 2}, "b": 1e-06}', '{"a": 1, "b": 1e-06}'),
        ('{"k": [1, {"x": "}"}], "a": "\\u00e9"}', '{"a": "\\u00e9"}'),
        ('{\n  "a": 1,\n  "k": {}\n}\n', '{\n  "a": 1\n}\n'),
        ('{\n  "k": null\n}', "{\n  \n}"),
        ('{"t": {"k": 1, "k2": 2}, "k": 0}', '{"t": {"k2": 2}}'),
        ('{"t": {"x": {"k": 1}}, "y": ["k"]}', '{"t": {"x": {}}, "y": ["k"]}'),
        ('{"a": "k"}', '{"a": "k"}'),
        ("{}", "{}"),
    ],
)
def test_one_key_less(text: str, left: str) -> None:
    assert without(text, "k") == left
    json.loads(left)


def test_one_key_less_of_the_real_files(shared: Path) -> None:
    for path in sorted(shared.glob("skus/*/*/config.json")):
        text = path.read_text()
        whole = json.loads(text)
        left = without(text, "quantization_config")
        assert json.loads(left) == {k: v for k, v in whole.items() if k != "quantization_config"}
        assert ("quantization_config" in whole) or left == text


# -- at the size of the published ones


@pytest.mark.parametrize(
    ("sku", "total", "maps"),
    [
        ("Qwen3.5-27B", 27_781_427_952, 407),
        ("Qwen3.5-35B-A3B", 35_951_822_704, 41 * (256 * 3 + 3) + 11 * 4 + 30 * 3),
    ],
)
@pytest.mark.slow
def test_published_sizes_in_fp8(
    shared: Path, tmp_path: Path, sku: str, total: int, maps: int
) -> None:
    """Every tensor accounted for, experts one by one, and the merge planned from headers."""
    config = config_of(shared, sku)
    shapes: Mapping[str, tuple[int, ...]] = shapes_of(shared, sku)
    if "num_experts" in config["text_config"]:
        shapes = derived(config, mtp_fused=False, fused=False)
    tensors: Tensors = {}
    for name, shape in shapes.items():
        quant = is_quantized(name)
        tensors |= block_fp8(name, *shape) if quant else {name: ("BF16", shape)}
    for file in write_sku(shared, tmp_path, sku, {}).glob("*.safetensors*"):
        file.unlink()  # template and tokenizer stay
    config |= section("fp8", fmt="e4m3", weight_block_size=[128, 128])
    began = time.perf_counter()
    checkpoint(tensors, config, tmp_path)
    wrote = time.perf_counter()
    found = identify(str(tmp_path))
    known = time.perf_counter()
    assert found.quantization is not None
    assert found.quantization.formats == {Format.BLOCK_FP8: maps}
    assert found.layout.parameters == total
    assert len(found.layout.scales) == maps
    plan = plan_merge(found.checkpoint, found.quantization)
    planned = time.perf_counter()
    assert plan.decoded == maps
    assert plan.size == 2 * total  # all of it in bf16
    figure(
        f"{sku} in FP8: {len(tensors)} tensors identified in {known - wrote:.2f} s, planned in "
        f"{planned - known:.2f} s (written in {wrote - began:.1f})"
    )
