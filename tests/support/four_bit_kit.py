"""Checkpoints in 4 bits as transformers with bitsandbytes saves them, and a decoder in NumPy."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import save_file
from support.moe_kit import INDEX, tensors_of
from torch import Tensor

#: What bitsandbytes quantizes by default: each nn.Linear of the layers of the text model.
LINEARS = r"language_model\.layers\.\d+\..*(_proj|in_proj_(qkv|z))\.weight$"


def quantized(
    weight: Tensor, *, kind: str = "nf4", blocksize: int = 64, nested: bool = True
) -> dict[str, Tensor]:
    """The tensors of a weight by what follows its name, as bitsandbytes writes them."""
    packed, state = bnb.quantize_4bit(
        weight.contiguous(), blocksize=blocksize, quant_type=kind, compress_statistics=nested
    )
    return {"": packed} | {f".{leaf}": value for leaf, value in state.as_dict(packed=True).items()}


def decoded(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The values of a 4-bit weight by the definition, computed in NumPy."""
    leaf = next(n for n in tensors if n.startswith(f"{name}.quant_state."))
    state: dict[str, Any] = json.loads(tensors[leaf].numpy().tobytes())
    packed = tensors[name].numpy().reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    count = int(np.prod(state["shape"]))
    values = tensors[f"{name}.quant_map"].numpy()[codes[:count]]
    scales = tensors[f"{name}.absmax"].numpy()
    if "nested_blocksize" in state:
        wide = np.repeat(tensors[f"{name}.nested_absmax"].numpy(), state["nested_blocksize"])
        scales = tensors[f"{name}.nested_quant_map"].numpy()[scales] * wide[: len(scales)]
        scales = (scales + np.float32(state["nested_offset"])).astype(np.float32)
    values = values * np.repeat(scales, state["blocksize"])[:count]
    dtype: torch.dtype = getattr(torch, state["dtype"])
    return torch.from_numpy(values.reshape(state["shape"])).to(dtype)


def write_four_bit(
    source: Path, folder: Path, *, pattern: str = LINEARS, skip: str = "$^", **options: Any
) -> Path:
    """A bf16 checkpoint in 4 bits.

    Args:
        source: the bf16 checkpoint.
        folder: what is written.
        pattern: regular expression on names on disk: what is quantized.
        skip: regular expression: what is not, as in ``llm_int8_skip_modules``.
        options: of `quantized`.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    tensors: dict[str, Tensor] = {}
    for name, value in tensors_of(source).items():
        if re.search(pattern, name) and not re.search(skip, name):
            tensors |= {name + leaf: part for leaf, part in quantized(value, **options).items()}
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": options.get("kind", "nf4"),
        "bnb_4bit_use_double_quant": options.get("nested", True),
        "bnb_4bit_compute_dtype": "bfloat16", "llm_int8_skip_modules": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_decoded(four_bit: Path, folder: Path) -> Path:
    """The same checkpoint with its values in 16 bits, decoded in NumPy."""
    shutil.copytree(four_bit, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    tensors, plain = tensors_of(four_bit), {}
    for name, value in tensors.items():
        if f"{name}.absmax" in tensors:
            plain[name] = decoded(name, tensors)
        elif not re.search(r"\.weight\.", name):
            plain[name] = value
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
