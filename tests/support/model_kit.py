"""Small configs with the tensors that they imply, and JSON files of model folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qcore.testing.checkpoints import Shapes

#: A text section as small as the architecture allows, sizes all different.
TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "attention_bias": False,
    "attn_output_gate": True,
    "eos_token_id": 248044,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 40,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 10,
    "mtp_num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 1, 0],
    },
    "vocab_size": 96,
}


def small_config(*, vision: bool = True, tied: bool = True, **text: Any) -> dict[str, Any]:
    """config.json in the vision-language layout; `text` overrides keys of its text section."""
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": TEXT | text,
        "tie_word_embeddings": tied,
    }
    return config | ({"vision_config": {"depth": 1, "hidden_size": 8}} if vision else {})


def small_shapes(*, vision: bool = True, tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Tensors of `small_config`, written out by hand from the formulas of the blocks."""
    root = "model.language_model"
    shapes: dict[str, tuple[int, ...]] = {f"{root}.embed_tokens.weight": (96, 24)}
    for layer in range(3):
        delta = f"{root}.layers.{layer}.linear_attn"
        shapes |= {
            f"{delta}.in_proj_qkv.weight": (64, 24),  # 2 * 2 * 6 + 4 * 10
            f"{delta}.in_proj_z.weight": (40, 24),
            f"{delta}.in_proj_a.weight": (4, 24),
            f"{delta}.in_proj_b.weight": (4, 24),
            f"{delta}.conv1d.weight": (64, 1, 4),
            f"{delta}.A_log": (4,),
            f"{delta}.dt_bias": (4,),
            f"{delta}.norm.weight": (10,),
            f"{delta}.out_proj.weight": (24, 40),
        }
    for layer in (f"{root}.layers.3", "mtp.layers.0"):
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (128, 24),  # 4 heads * 2 * 16
            f"{layer}.self_attn.k_proj.weight": (32, 24),
            f"{layer}.self_attn.v_proj.weight": (32, 24),
            f"{layer}.self_attn.o_proj.weight": (24, 64),
            f"{layer}.self_attn.q_norm.weight": (16,),
            f"{layer}.self_attn.k_norm.weight": (16,),
        }
    for layer in (*(f"{root}.layers.{n}" for n in range(4)), "mtp.layers.0"):
        shapes |= {
            f"{layer}.input_layernorm.weight": (24,),
            f"{layer}.post_attention_layernorm.weight": (24,),
            f"{layer}.mlp.gate_proj.weight": (40, 24),
            f"{layer}.mlp.up_proj.weight": (40, 24),
            f"{layer}.mlp.down_proj.weight": (24, 40),
        }
    shapes |= {
        f"{root}.norm.weight": (24,),
        "mtp.fc.weight": (24, 48),
        "mtp.norm.weight": (24,),
        "mtp.pre_fc_norm_embedding.weight": (24,),
        "mtp.pre_fc_norm_hidden.weight": (24,),
    }
    if vision:
        shapes |= {
            "model.visual.patch_embed.proj.weight": (8, 3, 2, 4, 4),
            "model.visual.blocks.0.attn.qkv.weight": (24, 8),
            "model.visual.merger.linear_fc1.weight": (24, 32),
        }
    if not tied:
        shapes["lm_head.weight"] = (96, 24)
    return shapes


#: What a mixture of experts has in place of ``intermediate_size``, sizes all different.
MOE: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 10,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 14,
}


def small_moe_config(*, vision: bool = True, tied: bool = True, **text: Any) -> dict[str, Any]:
    """`small_config` of the mixture of experts."""
    config = small_config(vision=vision, tied=tied, **(MOE | text))
    del config["text_config"]["intermediate_size"]
    kinds = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
    return config | kinds


def small_moe_shapes(
    *, vision: bool = True, tied: bool = True, fused: bool = True, mtp_fused: bool = False,
    experts: int = 4, vocab: int = 96,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Tensors of `small_moe_config`, written out by hand; as published 3.5 where not told else."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in small_shapes(vision=vision, tied=tied).items():
        if ".mlp." not in name:
            whole_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
            shapes[name] = (vocab, 24) if whole_vocabulary else shape
    trunk = [f"model.language_model.layers.{n}" for n in range(4)]
    for layer, stacked in (*((name, fused) for name in trunk), ("mtp.layers.0", mtp_fused)):
        shapes |= {
            f"{layer}.mlp.gate.weight": (experts, 24),
            f"{layer}.mlp.shared_expert.gate_proj.weight": (14, 24),
            f"{layer}.mlp.shared_expert.up_proj.weight": (14, 24),
            f"{layer}.mlp.shared_expert.down_proj.weight": (24, 14),
            f"{layer}.mlp.shared_expert_gate.weight": (1, 24),
        }
        if stacked:
            shapes |= {
                f"{layer}.mlp.experts.gate_up_proj": (experts, 20, 24),
                f"{layer}.mlp.experts.down_proj": (experts, 24, 10),
            }
            continue
        for expert in range(experts):
            shapes |= {
                f"{layer}.mlp.experts.{expert}.gate_proj.weight": (10, 24),
                f"{layer}.mlp.experts.{expert}.up_proj.weight": (10, 24),
                f"{layer}.mlp.experts.{expert}.down_proj.weight": (24, 10),
            }
    return shapes


def as_text_class(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The names that a save of the text class has: one prefix, no tower, no mtp."""
    return {
        name.replace("model.language_model.", "model."): shape
        for name, shape in shapes.items()
        if not name.startswith(("model.visual.", "mtp."))
    }


def key_list(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a ``weight_keys.txt``: name, tab, JSON list."""
    lines = (line.split("\t") for line in path.read_text().splitlines() if line.strip())
    return {name: tuple(json.loads(shape)) for name, shape in lines}


def write_index(folder: Path, weight_map: Mapping[str, object]) -> None:
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)},
    )


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Read a JSON object, let `change` edit it in place, write it back."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)


def snapshot(folder: Path) -> Iterable[str]:
    """Every path below a folder, hidden ones too: for "nothing was written"."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
