"""Checkpoints in block FP8, quantized here by the definition and read by no other code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.moe_kit import INDEX, tensors_of
from torch import Tensor

#: What the published repositories quantize; embeddings, head, norms, router and gates they keep.
_QUANTIZED = re.compile(
    r"(model\.|model\.language_model\.|mtp\.)layers\.\d+\..*"
    r"((q|k|v|o|gate|up|down|out)_proj(\.weight)?|in_proj_(qkv|z)\.weight|gate_up_proj)$"
)


def is_quantized(name: str) -> bool:
    return _QUANTIZED.match(name) is not None


def to_fp8(
    weight: Tensor, block: Sequence[int], scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """``[..., out, in]`` -> 8-bit floats, and a scale a block by which they are multiplied."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
    grid = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    scale = (grid.abs().amax((-3, -1)) / 448).clamp(min=1e-8).to(scale_dtype)
    return (weight.float() / spread(scale, block, weight)).to(torch.float8_e4m3fn), scale


def spread(scale: Tensor, block: Sequence[int], weight: Tensor) -> Tensor:
    """Each value's scale, picked by its row and column."""
    rows, columns = (torch.arange(n) // b for n, b in zip(weight.shape[-2:], block, strict=True))
    return scale.float()[..., rows[:, None], columns[None, :]]


def decoded(weight: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    """bfloat16 by the definition: ``value * scale`` in float32, rounded once."""
    return (weight.float() * spread(scale, block, weight)).bfloat16()


def write_fp8(
    source: Path,
    folder: Path,
    *,
    block: Sequence[int] = (16, 16),
    scale_dtype: torch.dtype = torch.float32,
    shards: int = 3,
    scales_apart: bool = False,
    also: Sequence[str] = (),
) -> Path:
    """A bf16 checkpoint in block FP8: in several files, scales in one of their own if asked.

    Weights of the modules `also` are quantized beside those of `is_quantized`.
    """
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    tensors: dict[str, Tensor] = {}
    for name, value in tensors_of(source).items():
        if is_quantized(name) or name.endswith(tuple(f"{module}.weight" for module in also)):
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(value, block, scale_dtype)
        else:
            tensors[name] = value
    files: dict[str, dict[str, Tensor]] = {}
    for number, name in enumerate(tensors):
        apart = scales_apart and name.endswith("_scale_inv")
        file = "scales" if apart else f"part-{number % shards}"
        files.setdefault(f"{file}.safetensors", {})[name] = tensors[name]
    for file, found in files.items():
        save_file(found, folder / file, metadata={"format": "pt", "of": file})
    size = sum(value.nbytes for value in tensors.values())
    weight_map = {name: file for file, found in files.items() for name in found}
    write_index(folder, {"total_size": size}, weight_map)
    edit(folder, block)
    return folder


def write_index(folder: Path, metadata: Mapping[str, int], weight_map: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


def edit(folder: Path, block: Sequence[int]) -> None:
    """Put ``quantization_config`` into config.json, before its last key, and touch nothing else."""
    path = folder / "config.json"
    text = path.read_text()
    section = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head", "model.visual", "in_proj_a", "in_proj_b", "mtp.fc",
                                   "mlp.gate", "shared_expert_gate"],
    }  # fmt: skip
    last = text.rindex('\n  "') + 1
    path.write_text(f'{text[:last]}  "quantization_config": {json.dumps(section)},\n{text[last:]}')


def write_bf16(fp8: Path, folder: Path, block: Sequence[int] = (16, 16)) -> Path:
    """The same checkpoint, decoded by hand, in one file and without the config's section."""
    ignore = shutil.ignore_patterns("*.safetensors", INDEX, "hf_quant_config.json")
    shutil.copytree(fp8, folder, ignore=ignore)
    tensors = tensors_of(fp8)
    plain = {
        name: decoded(value, tensors[f"{name}_scale_inv"], block)
        if f"{name}_scale_inv" in tensors
        else value
        for name, value in tensors.items()
        if not name.endswith("_scale_inv")
    }
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
