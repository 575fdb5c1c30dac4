"""Adds a tiny vision tower to a tiny text checkpoint, for tests and examples.

This file decides what is added to a checkpoint that an architecture's tiny writer created: a tower
of two blocks with random weights, ids of the media tokens, processor files with small limits, and
a template that prints a placeholder for each image or video. The family's tokenizer, tiny or
not, already has the tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from qcore.api import Table
from qcore.api import Tensor as Entry

from .placeholders import END, START, TOKEN_IDS
from .table import SECTION, parts

#: Key of config.json -> token whose id it holds.
TOKENS = {key: token for token, (key, _) in TOKEN_IDS.items()} | {
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_TEXT_PART = "{{ part.text }}"
_ANY_PART = """
      {%- if 'image' in part or part.type == 'image' -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif 'video' in part or part.type == 'video' -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- else -%}{{ part.text }}{%- endif -%}
    """


def add_tower(folder: Path, *, seed: int = 0, **vision: Any) -> None:
    """Add a vision tower with tokens, template and processor files to a tiny checkpoint.

    Args:
        folder: checkpoint with one ``model.safetensors`` and the family's tiny template.
        seed: random seed of the weights.
        vision: overrides of keys of ``vision_config``.

    Raises:
        ValueError: the folder is not such a checkpoint.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config |= {key: tokenizer.token_to_id(token) for key, token in TOKENS.items()}
    if None in (config[key] for key in TOKENS):
        raise ValueError(f"{folder}: the tokenizer has no media tokens")
    config[SECTION] = tiny_vision(config) | vision
    _template(folder / "chat_template.jinja")
    _processor(folder, config[SECTION])
    _weights(folder / "model.safetensors", config, seed)
    _json(folder / "config.json", config)


def tiny_vision(config: dict[str, Any]) -> dict[str, Any]:
    """``vision_config`` of the tiny tower for the text model of `config`."""
    return {
        "model_type": config["model_type"],
        "deepstack_visual_indexes": [],
        "depth": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 72,
        "num_heads": 2,
        "num_position_embeddings": 36,
        "out_hidden_size": config["text_config"]["hidden_size"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _template(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text.count(_TEXT_PART) != 1:
        raise ValueError(f"{path}: not the tiny template")
    path.write_text(text.replace(_TEXT_PART, _ANY_PART), encoding="utf-8")


def _processor(folder: Path, vision: dict[str, Any]) -> None:
    """Write processor files like the hub's, with limits of 1 to 64 tokens per image."""
    side = vision["patch_size"] * vision["spatial_merge_size"]
    shared = {
        "patch_size": vision["patch_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    size = {"longest_edge": 64 * side**2, "shortest_edge": side**2}
    image = {"size": size, **shared, "image_processor_type": "Qwen2VLImageProcessorFast"}
    size = {"longest_edge": 256 * side**2, "shortest_edge": 4 * side**2}
    video = {"size": size, **shared, "video_processor_type": "Qwen3VLVideoProcessor"}
    _json(folder / "preprocessor_config.json", image)
    _json(folder / "video_preprocessor_config.json", video)


def _weights(path: Path, config: dict[str, Any], seed: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: not found; a tiny checkpoint has one file of weights")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    generator = torch.Generator().manual_seed(seed)
    for entry in Table(list(parts(config))):
        tensors[entry.name] = _random(entry, generator)
    save_file(tensors, path, metadata={"format": "pt"})


def _random(entry: Entry, generator: torch.Generator) -> torch.Tensor:
    """Random values that exercise every norm and bias: none has its usual initial value."""
    noise = torch.randn(entry.shape, generator=generator)
    if len(entry.shape) == 1:
        center = float("norm" in entry.name and entry.name.endswith("weight"))
        value = center + 0.1 * noise
    elif "pos_embed" in entry.name:
        value = 0.5 * noise
    else:
        value = noise / noise[0].numel() ** 0.5
    return value.to(torch.bfloat16)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
