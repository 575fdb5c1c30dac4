"""Checkpoints of real shapes with random weights, written by transformers' own writer.

The vision-language class saves names, shards and index as the hub has them; ``mtp.*`` is
added, because transformers drops it. Tokenizer and template are the real ones.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def mtp_shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the multi-token-prediction layer, by the text config."""
    h, d = text["hidden_size"], text["head_dim"]
    q, kv = text["num_attention_heads"] * d, text["num_key_value_heads"] * d
    p = "mtp.layers.0"
    return {
        "mtp.fc.weight": (h, 2 * h),
        "mtp.norm.weight": (h,),
        "mtp.pre_fc_norm_embedding.weight": (h,),
        "mtp.pre_fc_norm_hidden.weight": (h,),
        f"{p}.input_layernorm.weight": (h,),
        f"{p}.post_attention_layernorm.weight": (h,),
        **_mtp_mlp(f"{p}.mlp", text),
        f"{p}.self_attn.q_proj.weight": (2 * q, h),
        f"{p}.self_attn.k_proj.weight": (kv, h),
        f"{p}.self_attn.v_proj.weight": (kv, h),
        f"{p}.self_attn.o_proj.weight": (h, q),
        f"{p}.self_attn.q_norm.weight": (d,),
        f"{p}.self_attn.k_norm.weight": (d,),
    }


def _mtp_mlp(mlp: str, text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The feed-forward maps; of a mixture of experts one by one, as 3.5 has them."""

    def maps(at: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{at}.gate_proj.weight": (inner, h),
            f"{at}.up_proj.weight": (inner, h),
            f"{at}.down_proj.weight": (h, inner),
        }

    h = text["hidden_size"]
    if "num_experts" not in text:
        return maps(mlp, text["intermediate_size"])
    shapes = {f"{mlp}.gate.weight": (text["num_experts"], h)}
    shapes |= {f"{mlp}.shared_expert_gate.weight": (1, h)}
    shapes |= maps(f"{mlp}.shared_expert", text["shared_expert_intermediate_size"])
    for number in range(text["num_experts"]):
        shapes |= maps(f"{mlp}.experts.{number}", text["moe_intermediate_size"])
    return shapes


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Values on which every rule matters: norms, decay and conv are off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(0.5, 8.0, generator=generator).log_()
            elif name.endswith("dt_bias"):
                parameter.normal_(-2.0, 1.0, generator=generator)
            elif name.endswith("linear_attn.norm.weight"):
                parameter.normal_(1.0, 0.1, generator=generator)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.1, generator=generator)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                each = parameter.shape[2:] if ".experts." in name else parameter.shape[1:]
                fan = math.prod(each)
                parameter.normal_(0.0, 1 / math.sqrt(fan), generator=generator)


def write_real(
    shared: Path,
    folder: Path,
    sku: str = "Qwen3.5-0.8B",
    *,
    shard: str = "900MB",
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """A vision-language checkpoint of the shape of `sku`, about 1.7 GB for 0.8B.

    Args:
        shared: the reference folder.
        folder: where to write.
        sku: a folder name under ``skus/qwen3.5``.
        shard: largest shard.
        text: overrides of ``text_config``, for slices.
        vision: the same of ``vision_config``.
    """
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    source = shared / "skus" / "qwen3.5" / sku
    raw = json.loads((source / "config.json").read_text())
    raw["text_config"] |= text or {}
    raw["vision_config"] |= vision or {}
    config = Qwen3_5Config(**raw)
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    randomise(model)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard)
    generator = torch.Generator().manual_seed(1)
    mtp = {
        name: (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        for name, shape in mtp_shapes(raw["text_config"]).items()
    }
    add_shard(folder, mtp)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    shutil.copyfile(source / "chat_template.jinja", folder / "chat_template.jinja")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "skus" / "tokenizer" / name, folder / name)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [248046, 248044], "pad_token_id": 248044})
    )
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shutil.copyfile(shared / "skus" / "processor" / name, folder / name)
    return folder


def add_shard(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    index_file = folder / "model.safetensors.index.json"
    name = "model-mtp.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    if index_file.exists():
        index = json.loads(index_file.read_text())
    else:
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", "pt") as file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), "model.safetensors")}
    index["weight_map"] |= dict.fromkeys(tensors, name)
    index_file.write_text(json.dumps(index, indent=2))
