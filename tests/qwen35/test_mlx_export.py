"""An MLX export is recognized by layout and values, not by names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.model_kit import small_config, small_shapes, write_json
from torch import Tensor

from qcore.checkpoint.checkpoint import Checkpoint
from qcore.errors import InputError
from qcore_qwen35.mismatch import refuse

ROOT = "model.language_model."
Tensors = dict[str, Tensor]


def hub() -> Tensors:
    """Random values in the manner of published weights: zero-centered norms around 0."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in small_shapes(vision=False).items():
        value = 0.3 * torch.randn(shape, generator=generator)
        tensors[name] = (
            value + 1 if name.endswith("linear_attn.norm.weight") else value
        ).bfloat16()
    return tensors


def is_shifted(name: str, value: Tensor) -> bool:
    return value.ndim == 1 and "norm" in name and ".linear_attn." not in name


def shifted(tensors: Tensors) -> Tensors:
    return {n: v + 1 if is_shifted(n, v) else v for n, v in tensors.items()}


def turned(tensors: Tensors) -> Tensors:
    return {
        n: v.movedim(2, 1).contiguous() if n.endswith("conv1d.weight") else v
        for n, v in tensors.items()
    }


def renamed(tensors: Tensors) -> Tensors:
    return {n.replace(ROOT, "language_model.model."): v for n, v in tensors.items()}


def quantized(tensors: Tensors) -> Tensors:
    """Four bit in groups, as ``mlx_lm.convert -q`` writes it."""
    made = {}
    for name, value in tensors.items():
        if name.endswith("mlp.gate_proj.weight"):
            stem = name.removesuffix(".weight")
            made[name] = torch.zeros(value.shape[0], value.shape[1] // 8, dtype=torch.uint32)
            made[f"{stem}.scales"] = torch.ones(value.shape[0], 1).bfloat16()
            made[f"{stem}.biases"] = torch.zeros(value.shape[0], 1).bfloat16()
        else:
            made[name] = value
    return made


def of(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: v.to(dtype) for n, v in shifted(tensors).items()}


EXPORTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "as mlx-lm writes it": (lambda t: renamed(turned(shifted(t))), "transposed"),
    "with the hub's names": (lambda t: turned(shifted(t)), "transposed"),
    "without its norms": (lambda t: renamed(turned(t)), "transposed"),
    "convolutions turned back": (lambda t: renamed(shifted(t)), "1 was added"),
    "convolutions turned back, the hub's names": (shifted, "1 was added"),
    "shifted twice": (lambda t: shifted(shifted(t)), "1 was added"),
    "shifted, float16": (of(torch.float16), "1 was added"),
    "shifted, float32": (of(torch.float32), "1 was added"),
    "quantized": (lambda t: renamed(quantized(t)), "quantized"),
}


def write(folder: Path, tensors: Tensors) -> Checkpoint:
    write_json(folder / "config.json", small_config(vision=False))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(folder)


@pytest.mark.parametrize("case", EXPORTS)
def test_an_export_is_refused(tmp_path: Path, case: str) -> None:
    change, why = EXPORTS[case]
    with pytest.raises(InputError) as caught:
        refuse(write(tmp_path, change(hub())), moe=False)
    assert caught.value.code == "QC-QWEN35-004"
    assert "is an MLX export" in caught.value.message
    assert why in caught.value.message


ORIGINALS: dict[str, Callable[[Tensors], Tensors]] = {
    "the hub's": lambda t: t,
    "under MLX's names": renamed,
    "norms of a new model": lambda t: {
        n: torch.zeros_like(v) if is_shifted(n, v) else v for n, v in t.items()
    },
    "norms that are larger than published ones": lambda t: {
        n: v + 0.4 if is_shifted(n, v) else v for n, v in t.items()
    },
    "norms of which some are large": lambda t: {
        n: v * 9 if is_shifted(n, v) else v for n, v in t.items()
    },
}


@pytest.mark.parametrize("case", ORIGINALS)
def test_another_checkpoint_is_not_an_export(tmp_path: Path, case: str) -> None:
    refuse(write(tmp_path, ORIGINALS[case](hub())), moe=False)


def test_headers_of_the_hub_are_judged_by_shape_alone(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, shifted(hub()))
    checkpoint.headers_only = True
    refuse(checkpoint, moe=False)
    checkpoint = write(tmp_path, turned(load_file(tmp_path / "model.safetensors")))
    checkpoint.headers_only = True
    with pytest.raises(InputError):
        refuse(checkpoint, moe=False)
