"""Small mixtures of experts of the stock classes, for adapters of experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from support.model_kit import TEXT
from support.peer_kit import VISION, layers
from transformers import (
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
)

from qcore.api.parameters import Table
from qcore.checkpoint.checkpoint import Checkpoint
from qcore.checkpoint.layout import Layout, locate
from qcore_qwen35.table import parts

PREFIX = {"text": "model.", "vl": "model.language_model."}
CLASSES = tuple(PREFIX)
ROOT = "model.language_model."
E, LAYERS = 5, 2
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
#: (hidden, an expert's inner size): none alike; gate_up is square; down is square.
SIZES = {"oblong": (32, 24), "square gate_up": (32, 16), "square down": (32, 32)}


def moe(kind: str, size: str = "oblong") -> Any:
    """A random model of the stock class, two layers."""
    hidden, ffn = SIZES[size]
    text = copy.deepcopy(TEXT) | {
        "model_type": "qwen3_5_moe_text", "hidden_size": hidden, "moe_intermediate_size": ffn,
        "num_experts": E, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 40,
        "num_hidden_layers": LAYERS, "layer_types": ["linear_attention", "full_attention"],
        "mtp_num_hidden_layers": 0,
    }  # fmt: skip
    del text["intermediate_size"]
    torch.manual_seed(0)
    if kind == "text":
        model: Any = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**text))
    else:
        config = Qwen3_5MoeConfig(
            text_config=text, vision_config=VISION | {"out_hidden_size": hidden},
            image_token_id=90, video_token_id=91, vision_start_token_id=92,
            vision_end_token_id=93,
        )  # fmt: skip
        model = Qwen3_5MoeForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or name.endswith("mlp.gate.weight"):
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif parameter.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def layout_of(folder: Path) -> Layout:
    checkpoint = Checkpoint.open(folder)
    return locate(Table(list(parts(checkpoint.config, moe=True))), checkpoint)


def by_weight(wrapped: Any, kind: str) -> dict[str, Any]:
    """Stock LoRA layers by the canonical name of the weight that they change."""
    found: dict[str, Any] = {}
    for path, layer in layers(wrapped).items():
        name = path.replace(".base_layer", "")
        leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        found[f"{ROOT}{name.removeprefix(PREFIX[kind])}.{leaf}"] = layer
    return found
