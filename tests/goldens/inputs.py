"""The files that every recorded command reads: checkpoints, rows, settings, a foreign adapter.

This file decides what they hold. Models and rows that are meant to fail come from `bad_inputs`.
It derives everything from two tiny checkpoints, those that ``qcore demo`` writes, and imports no
qcore, so that both versions of a comparison read the same bytes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from goldens.bad_inputs import make_bad_inputs
from goldens.edits import (
    PREFIX,
    WEIGHTS,
    conversation,
    edit_weights,
    part,
    write_json,
    write_rows,
)

_SEED = 0
_TEXT_PART = "{{ part.text }}"
#: The tiny template prints text only; this prints a placeholder for each image and video.
_MEDIA_PART = (
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{ part.text }}{%- endif -%}"
)
#: Keys of config.json and the tokens whose ids they hold.
_MEDIA_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
#: ``vision_config`` of a tower of one block; the width of the text model is added.
_TOWER: dict[str, Any] = {
    "deepstack_visual_indexes": [], "depth": 1, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 32, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 72,
    "num_heads": 2, "num_position_embeddings": 36, "patch_size": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
_PROCESSOR: dict[str, Any] = {
    "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "processor_class": "Qwen3VLProcessor",
}  # fmt: skip
_RUN = """\
max_steps: 3
dtype: fp32
quantization: none
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
learning_rate: 0.01
weight_decay: 0.1
lora_dropout: 0.1
r: 4
lora_alpha: 8
target_groups: [attn, gdn, mlp]
group_r: {mlp: 3}
group_lora_alpha: {attn: 5}
eval_fraction: 0.2
eval_steps: 2
seed: 7
"""

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
_CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
_ROWS = (
    conversation("What is the capital of France?", "Paris."),
    conversation("What do bees make?", "Bees make honey."),
    conversation("What is two plus three?", "Five.", reasoning_content="Two and three are five."),
    {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            *conversation("Which colour is the sky?", "Blue.")["messages"],
            *conversation("And the grass?", "Green.")["messages"],
        ]
    },
    {
        "tools": [_WEATHER],
        "messages": [
            *conversation("Weather in Oslo?", "", tool_calls=[_CALL])["messages"],
            {"role": "tool", "content": "snow"},
            {"role": "assistant", "content": "There is snow."},
        ],
    },
)
_MEDIA_ROWS = (
    conversation("Who are you?", "I am Ada."),
    conversation([part("image", "0.png"), part("text", "What is this?")], "Noise."),
    conversation(
        [part("image", "1.png"), part("text", "and"), part("image", "2.png")], "Two images."
    ),
    conversation([part("text", "Look:"), part("video", "film.gif")], "A film."),
)


def make_inputs(dense: Path, moe: Path, folder: Path) -> None:
    """Write all inputs into `folder`, which must not exist.

    Args:
        dense: the tiny dense checkpoint that ``qcore demo`` writes.
        moe: its tiny mixture of experts.
        folder: gets ``dense``, ``moe``, ``sharded``, ``vision``, ``foreign``, ``bad``, ``media``
            and the files of rows and settings.
    """
    folder.mkdir(parents=True)
    shutil.copytree(dense, folder / "dense")
    shutil.copytree(moe, folder / "moe")
    _shard(folder / "dense", folder / "sharded")
    _add_tower(folder / "dense", folder / "vision")
    _foreign_adapter(folder / "foreign")
    write_rows(folder / "rows.jsonl", _ROWS)
    _media(folder / "media")
    write_rows(folder / "media" / "rows.jsonl", _MEDIA_ROWS)
    (folder / "run.yaml").write_text(_RUN, encoding="utf-8")
    make_bad_inputs(folder)


def _shard(source: Path, folder: Path) -> None:
    """The same tensors in three files with an index."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number in range(3):
        file = f"model-0000{number + 1}-of-00003.safetensors"
        shard = {name: tensors[name] for name in names[number::3]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    values = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    write_json(folder / f"{WEIGHTS}.index.json", values)


def _add_tower(source: Path, folder: Path) -> None:
    """The same checkpoint with a vision tower, media tokens and processor files."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in tokens}
    width = config["text_config"]["hidden_size"]
    tower = _TOWER | {"model_type": config["model_type"], "out_hidden_size": width}
    config |= {key: ids[token] for key, token in _MEDIA_TOKENS.items()}
    write_json(folder / "config.json", config | {"vision_config": tower})
    edit_weights(folder, lambda tensors: tensors.update(_tower_tensors(width)))
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text.replace(_TEXT_PART, _MEDIA_PART), encoding="utf-8")
    side = _PROCESSOR["patch_size"] * _PROCESSOR["merge_size"]
    image = {
        "size": {"longest_edge": 16 * side**2, "shortest_edge": side**2}, **_PROCESSOR,
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }  # fmt: skip
    video = {
        "size": {"longest_edge": 32 * side**2, "shortest_edge": 4 * side**2}, **_PROCESSOR,
        "video_processor_type": "Qwen3VLVideoProcessor",
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", image)
    write_json(folder / "video_preprocessor_config.json", video)


def _tower_tensors(text_width: int) -> dict[str, Tensor]:
    """Random bf16 weights of the tower, under the names of the hub."""
    width, inner = _TOWER["hidden_size"], _TOWER["intermediate_size"]
    merged = width * _TOWER["spatial_merge_size"] ** 2
    patch = (_TOWER["in_channels"], _TOWER["temporal_patch_size"], *[_TOWER["patch_size"]] * 2)
    block, merger = "blocks.0", "merger"
    linears: dict[str, tuple[int, ...]] = {
        "patch_embed.proj": (width, *patch),
        f"{block}.attn.qkv": (3 * width, width),
        f"{block}.attn.proj": (width, width),
        f"{block}.mlp.linear_fc1": (inner, width),
        f"{block}.mlp.linear_fc2": (width, inner),
        f"{merger}.linear_fc1": (merged, merged),
        f"{merger}.linear_fc2": (text_width, merged),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.weight": (_TOWER["num_position_embeddings"], width)
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for norm in (f"{block}.norm1", f"{block}.norm2", f"{merger}.norm"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    generator = torch.Generator().manual_seed(_SEED)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:  # a norm or a bias, off its initial value
            noise = 0.1 * noise + float("norm" in name and name.endswith("weight"))
        else:
            noise /= noise[0].numel() ** 0.5
        tensors[f"model.visual.{name}"] = noise.to(torch.bfloat16)
    return tensors


def _foreign_adapter(folder: Path) -> None:
    """An adapter on one module as PEFT writes it: without a manifest and a base fingerprint."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(_SEED)
    module = f"base_model.model.{PREFIX}.layers.3.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.randn(2, 128, generator=generator),
        f"{module}.lora_B.weight": torch.randn(256, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    write_json(folder / "adapter_config.json", config)


def _media(folder: Path) -> None:
    """Three images of random pixels and a film of five frames, a second each."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(_SEED)

    def noise(width: int, height: int) -> Image.Image:
        shape = (height, width, 3)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return Image.fromarray(pixels.numpy())

    for number, (width, height) in enumerate(((64, 64), (96, 40), (33, 70))):
        noise(width, height).save(folder / f"{number}.png")
    frames = [noise(64, 64).convert("P") for _ in range(5)]
    frames[0].save(folder / "film.gif", save_all=True, append_images=frames[1:], duration=500)
