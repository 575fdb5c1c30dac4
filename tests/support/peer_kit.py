"""Tiny random models of the stock classes, and adapters as stock PEFT writes them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from support.model_kit import TEXT
from torch import Tensor, nn
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)

VOCAB, HIDDEN = TEXT["vocab_size"], TEXT["hidden_size"]
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
    "out_hidden_size": HIDDEN, "patch_size": 4, "num_position_embeddings": 16,
}  # fmt: skip
CLASSES = ("text", "vl")


def stock(
    kind: str, *, seed: int = 0, tied: bool = True, dtype: torch.dtype = torch.float32
) -> Any:
    """A random model of the text or of the vision-language class."""
    torch.manual_seed(seed)
    text = copy.deepcopy(TEXT)
    if kind == "text":
        text["tie_word_embeddings"] = tied
        model: Any = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**text))
    else:
        config = Qwen3_5Config(
            text_config=text,
            vision_config=copy.deepcopy(VISION),
            tie_word_embeddings=tied,
            image_token_id=90, video_token_id=91, vision_start_token_id=92,
            vision_end_token_id=93,
        )  # fmt: skip
        model = Qwen3_5ForConditionalGeneration(config)
    with torch.no_grad():  # as fresh they are all alike: norms at 0, biases at 0
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def adapted(model: Any, *, seed: int = 1, **lora: Any) -> Any:
    """The model with stock LoRA on it; every B is random, so that every pair has an effect."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**(options | lora)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def saved(folder: Path, wrapped: Any) -> Path:
    """The adapter's folder, as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def layers(wrapped: Any) -> dict[str, nn.Module]:
    """Stock LoRA layers by module path, without PEFT's prefix."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in wrapped.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=ids, use_cache=False).logits
    return out
