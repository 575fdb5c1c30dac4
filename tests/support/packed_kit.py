"""Checkpoints of which some weights are packed, laid out as the published tools lay them out.

Values are random: a merge carries the bytes and reads none. The layouts are those that
compressed-tensors, NVIDIA's Model Optimizer, GPTQModel, AutoAWQ, bitsandbytes and transformers
write, by the names, dtypes and shapes of their tensors.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from support.fp8_kit import to_fp8
from support.moe_kit import INDEX, tensors_of
from torch import Tensor

Pack = Callable[[str, Tensor], dict[str, Tensor]]


def _bytes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def _fp8(*shape: int) -> Tensor:
    return torch.rand(shape).add_(0.1).to(torch.float8_e4m3fn)


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def nvfp4_modelopt(name: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {
        name: _bytes(rows, columns // 2), f"{name}_scale": _fp8(rows, -(-columns // 16)),
        f"{name}_scale_2": torch.rand(()), f"{_stem(name)}.input_scale": torch.rand(()),
    }  # fmt: skip


def nvfp4_compressed(name: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {
        f"{name}_packed": _bytes(rows, columns // 2), f"{name}_scale": _fp8(rows, columns // 16),
        f"{name}_global_scale": torch.rand(1), f"{_stem(name)}.input_global_scale": torch.rand(1),
    }  # fmt: skip


def gptq(name: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    stem = _stem(name)
    return {
        f"{stem}.qweight": _words(columns // 8, rows), f"{stem}.qzeros": _words(1, rows // 8),
        f"{stem}.scales": torch.rand(1, rows).half(),
        f"{stem}.g_idx": torch.zeros(columns, dtype=torch.int32),
    }  # fmt: skip


def awq(name: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    stem = _stem(name)
    return {
        f"{stem}.qweight": _words(columns, rows // 8), f"{stem}.qzeros": _words(1, rows // 8),
        f"{stem}.scales": torch.rand(1, rows).half(),
    }  # fmt: skip


def int4_compressed(name: str, weight: Tensor) -> dict[str, Tensor]:
    rows, columns = weight.shape
    return {
        f"{name}_packed": _words(rows, -(-columns // 8)),
        f"{name}_scale": torch.rand(rows, 1).bfloat16(),
        f"{name}_zero_point": _words(-(-rows // 8), 1),
        f"{name}_shape": torch.tensor([rows, columns]),
    }  # fmt: skip


def channel_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {
        name: weight.to(torch.float8_e4m3fn),
        f"{name}_scale": torch.rand(len(weight), 1).bfloat16(),
    }  # fmt: skip


def static_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {
        name: weight.to(torch.float8_e4m3fn), f"{name}_scale": torch.rand(()),
        f"{_stem(name)}.input_scale": torch.rand(()), f"{_stem(name)}.k_scale": torch.rand(()),
    }  # fmt: skip


def llm_int8(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {
        name: _bytes(*weight.shape).view(torch.int8), f"{_stem(name)}.SCB": torch.rand(len(weight)),
        f"{_stem(name)}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }  # fmt: skip


def block_fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    value, scale = to_fp8(weight, (16, 16), torch.bfloat16)
    return {name: value, f"{name}_scale_inv": scale}


#: How a tool packs a weight, and what it writes into config.json.
PACKERS: Mapping[str, tuple[Pack, dict[str, Any]]] = {
    "nvfp4-modelopt": (nvfp4_modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4-compressed": (
        nvfp4_compressed,
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 128}),
    "int4-compressed": (
        int4_compressed,
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "fp8-compressed": (
        channel_fp8,
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
    ),
    "fp8-modelopt": (static_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "int8-bitsandbytes": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8-blocks": (block_fp8, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
}


def write_packed(
    source: Path, folder: Path, packer: str, pattern: str, *, base: str | None = None
) -> Path:
    """A checkpoint whose weights that match `pattern` are packed, in two files with an index.

    Args:
        source: a bf16 checkpoint.
        folder: what is written.
        packer: a key of `PACKERS`.
        pattern: regular expression on names on disk.
        base: hub id of the original, for the model card.
    """
    pack, section = PACKERS[packer]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    torch.manual_seed(4)
    tensors: dict[str, Tensor] = {}
    for name, value in tensors_of(source).items():
        tensors |= pack(name, value) if re.search(pattern, name) else {name: value}
    files: dict[str, dict[str, Tensor]] = {}
    for number, name in enumerate(tensors):
        file = f"model-0000{number % 2 + 1}-of-00002.safetensors"
        files.setdefault(file, {})[name] = tensors[name].contiguous()
    for file, found in files.items():
        save_file(found, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, found in files.items() for name in found}
    size = sum(value.nbytes for value in tensors.values())
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = section
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if base is not None:
        (folder / "README.md").write_text(f"---\nbase_model: {base}\n---\n")
    return folder
