"""Checkpoints of every SKU: key lists derived from the published dimensions, by hand.

Nothing here comes from the table or from the records. The derivation is itself tested against
the key lists in the reference folder; the two SKUs of which there is none use it alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.model_kit import key_list, write_json

from qcore.testing import write_sparse_checkpoint

Shape = tuple[int, ...]
ROOT = "model.language_model"

#: What the facts say of the two SKUs without a key list: hidden, expert width, layers, heads,
#: KV heads, linear value heads, experts.
DERIVED: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "Qwen3.5-122B-A10B": (3072, 1024, 48, 32, 2, 64, 256),
    "Qwen3.5-397B-A17B": (4096, 1024, 60, 32, 2, 64, 512),
}


def config_of(shared: Path, sku: str) -> dict[str, Any]:
    """The real config.json, or that of 35B-A3B with the dimensions of the SKU."""
    if sku not in DERIVED:
        config: dict[str, Any] = json.loads((folder_of(shared, sku) / "config.json").read_text())
        return config
    config = config_of(shared, "Qwen3.5-35B-A3B")
    hidden, width, layers, heads, kv_heads, v_heads, experts = DERIVED[sku]
    config["text_config"] |= {
        "hidden_size": hidden,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
        "num_hidden_layers": layers,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "linear_num_value_heads": v_heads,
        "num_experts": experts,
        "num_experts_per_tok": 10 if experts == 512 else 8,
    }
    config["vision_config"]["out_hidden_size"] = hidden
    return config


def shapes_of(shared: Path, sku: str) -> dict[str, Shape]:
    """The real key list, or the derived one: trunk fused, prediction layer per expert."""
    if sku in DERIVED:
        return derived(config_of(shared, sku), mtp_fused=False)
    return key_list(folder_of(shared, sku) / "weight_keys.txt")


def folder_of(shared: Path, sku: str) -> Path:
    """The SKU's reference folder."""
    return shared / "skus" / sku.partition("-")[0].lower() / sku


def write_sku(shared: Path, folder: Path, sku: str, shapes: Mapping[str, Shape]) -> Path:
    """A header-only checkpoint as the hub has it, under its own name."""
    write_sparse_checkpoint(folder, config_of(shared, sku), shapes, shards=5)
    source = folder_of(shared, "Qwen3.5-35B-A3B" if sku in DERIVED else sku)
    (folder / "chat_template.jinja").write_bytes((source / "chat_template.jinja").read_bytes())
    tokenizer = shared / "skus" / "tokenizer" / "tokenizer_config.json"
    (folder / "tokenizer_config.json").write_bytes(tokenizer.read_bytes())
    write_json(folder / "generation_config.json", {"eos_token_id": [248046, 248044]})
    return folder


def derived(config: Mapping[str, Any], *, mtp_fused: bool, fused: bool = True) -> dict[str, Shape]:
    """Names and shapes of a mixture-of-experts checkpoint with its tower, by its config."""
    text, vision = config["text_config"], config["vision_config"]
    hidden = text["hidden_size"]
    shapes: dict[str, Shape] = {
        "lm_head.weight": (text["vocab_size"], hidden),
        f"{ROOT}.embed_tokens.weight": (text["vocab_size"], hidden),
        f"{ROOT}.norm.weight": (hidden,),
        "mtp.fc.weight": (hidden, 2 * hidden),
        "mtp.norm.weight": (hidden,),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
    }
    for number, kind in enumerate(text["layer_types"]):
        layer = f"{ROOT}.layers.{number}"
        shapes |= _delta(layer, text) if kind == "linear_attention" else _attention(layer, text)
        shapes |= _experts(layer, text, fused=fused)
    shapes |= _attention("mtp.layers.0", text)
    shapes |= _experts("mtp.layers.0", text, fused=mtp_fused)
    return shapes | _tower(vision)


def _delta(layer: str, text: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, heads = text["hidden_size"], text["linear_num_value_heads"]
    values = heads * text["linear_value_head_dim"]
    conv = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"] + values
    at = f"{layer}.linear_attn"
    return {
        f"{at}.A_log": (heads,),
        f"{at}.dt_bias": (heads,),
        f"{at}.conv1d.weight": (conv, 1, text["linear_conv_kernel_dim"]),
        f"{at}.in_proj_a.weight": (heads, hidden),
        f"{at}.in_proj_b.weight": (heads, hidden),
        f"{at}.in_proj_qkv.weight": (conv, hidden),
        f"{at}.in_proj_z.weight": (values, hidden),
        f"{at}.norm.weight": (text["linear_value_head_dim"],),
        f"{at}.out_proj.weight": (hidden, values),
    }


def _attention(layer: str, text: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, size = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    at = f"{layer}.self_attn"
    return {
        f"{at}.q_proj.weight": (2 * queries, hidden),
        f"{at}.k_proj.weight": (keys, hidden),
        f"{at}.v_proj.weight": (keys, hidden),
        f"{at}.o_proj.weight": (hidden, queries),
        f"{at}.q_norm.weight": (size,),
        f"{at}.k_norm.weight": (size,),
    }


def _experts(layer: str, text: Mapping[str, Any], *, fused: bool) -> dict[str, Shape]:
    hidden, width, experts = (
        text["hidden_size"], text["moe_intermediate_size"], text["num_experts"]
    )  # fmt: skip
    shared = text["shared_expert_intermediate_size"]
    at = f"{layer}.mlp"
    shapes: dict[str, Shape] = {
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{at}.gate.weight": (experts, hidden),
        f"{at}.shared_expert.gate_proj.weight": (shared, hidden),
        f"{at}.shared_expert.up_proj.weight": (shared, hidden),
        f"{at}.shared_expert.down_proj.weight": (hidden, shared),
        f"{at}.shared_expert_gate.weight": (1, hidden),
    }
    if fused:
        return shapes | {
            f"{at}.experts.gate_up_proj": (experts, 2 * width, hidden),
            f"{at}.experts.down_proj": (experts, hidden, width),
        }
    for number in range(experts):
        shapes |= {
            f"{at}.experts.{number}.gate_proj.weight": (width, hidden),
            f"{at}.experts.{number}.up_proj.weight": (width, hidden),
            f"{at}.experts.{number}.down_proj.weight": (hidden, width),
        }
    return shapes


def _tower(vision: Mapping[str, Any]) -> dict[str, Shape]:
    size, inner, out = vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"]
    merged = size * vision["spatial_merge_size"] ** 2
    patch = (3, vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    sizes: dict[str, tuple[int, int]] = {"merger.linear_fc1": (merged, merged)}
    sizes["merger.linear_fc2"] = (out, merged)
    norms = ["merger.norm"]
    for number in range(vision["depth"]):
        at = f"blocks.{number}"
        norms += [f"{at}.norm1", f"{at}.norm2"]
        sizes |= {
            f"{at}.attn.qkv": (3 * size, size),
            f"{at}.attn.proj": (size, size),
            f"{at}.mlp.linear_fc1": (inner, size),
            f"{at}.mlp.linear_fc2": (size, inner),
        }
    shapes: dict[str, Shape] = {
        "model.visual.patch_embed.proj.weight": (size, *patch),
        "model.visual.patch_embed.proj.bias": (size,),
        "model.visual.pos_embed.weight": (vision["num_position_embeddings"], size),
    }
    for name, (rows, columns) in sizes.items():
        shapes[f"model.visual.{name}.weight"] = (rows, columns)
        shapes[f"model.visual.{name}.bias"] = (rows,)
    for name in norms:
        shapes[f"model.visual.{name}.weight"] = shapes[f"model.visual.{name}.bias"] = (size,)
    return shapes
