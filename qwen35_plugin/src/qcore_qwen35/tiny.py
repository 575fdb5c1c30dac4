"""Writes a tiny random Qwen 3.5 checkpoint with its own tokenizer and template.

For the demo and for conformance tests: four layers, random weights from a fixed seed, a byte-level
BPE tokenizer trained on the sentences below. The checkpoint is laid out like those on the hub (the
vision-language class, ``model.language_model.*`` names, ``mtp.*``), without the tower.
"""

from __future__ import annotations

import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qcore.api import Table, Tensor

from .data import published
from .table import parts

#: Tokens that structure text but are not marked as special, as in the real tokenizer.
MARKS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
_MERGES = 320
#: Config keys of a mixture of experts, in place of ``intermediate_size``.
_MOE: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 48,
}
_CORPUS = (
    "system user assistant tool function parameter arguments name value type string number",
    "What is the capital of this country? The capital is the city that people name first.",
    "Which colour is the sky at noon? How many days has a week? What do bees make?",
    "Please answer in one short sentence. Think before you answer, then say it plainly.",
    "The user asks for a city, a colour, a number or an animal, so I name it and stop.",
    "France Paris Japan Tokyo Italy Rome Spain Madrid Egypt Cairo Kenya Nairobi Peru Lima",
)


def write(folder: Path, *, seed: int = 0, moe: bool = False, **text: Any) -> None:
    """Write config, weights, tokenizer, template and generation config into `folder`.

    Args:
        folder: output folder, created if it does not exist.
        seed: random seed of the weights.
        moe: write a mixture of experts: experts fused as on the hub, and split by expert in the
            prediction layer.
        text: overrides of keys of ``text_config``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    config = tiny_config(vocab_size=64 * math.ceil((size + 1) / 64), moe=moe, **text)
    _json(folder / "config.json", config)
    tokenizer.save(str(folder / "tokenizer.json"))
    _json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": config["text_config"]["max_position_embeddings"],
        },
    )
    stop = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    _json(folder / "generation_config.json", {"eos_token_id": stop, "do_sample": False})
    template = files("qcore_qwen35").joinpath("tiny.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    tied = "lm_head.weight" if config["tie_word_embeddings"] else None
    tensors: dict[str, torch.Tensor] = {}
    for tensor in Table(list(parts(config, moe=moe))):
        if tensor.name != tied:
            value = _random(tensor, generator)
            *_, separate = tensor.spellings()
            pieces = separate if tensor.part.name == "mtp" else next(tensor.spellings())
            for piece in pieces:
                tensors[piece.name] = value[piece.region].reshape(piece.shape).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tiny_config(*, vocab_size: int, moe: bool = False, **text: Any) -> dict[str, Any]:
    """config.json of the tiny checkpoint; `text` overrides keys of its ``text_config``."""
    if moe:
        text = _MOE | text
    layers = text.get("num_hidden_layers", 4)
    section = {
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": None,
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 256,
        "layer_types": [
            "linear_attention" if (n + 1) % 4 else "full_attention" for n in range(layers)
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 32,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 4096,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": True,
        "vocab_size": vocab_size,
    } | text
    if moe:
        del section["intermediate_size"]
    kind = "Moe" if moe else ""
    return {
        "architectures": [f"Qwen3_5{kind}ForConditionalGeneration"],
        "model_type": f"qwen3_5{'_moe' if moe else ''}",
        "text_config": section,
        "tie_word_embeddings": section["tie_word_embeddings"],
    }


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + _MERGES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(list(published("special_tokens")))
    tokenizer.add_tokens(list(MARKS))
    return tokenizer


def _random(tensor: Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random values that exercise every rule of the blocks: no norm keeps its initial 0."""
    name, shape = tensor.name, tensor.shape
    noise = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        value = torch.empty(shape).uniform_(0.5, 8.0, generator=generator).log()
    elif name.endswith("linear_attn.norm.weight"):
        value = 1 + 0.1 * noise
    elif name.endswith("dt_bias"):
        value = noise - 2
    elif len(shape) == 1:
        value = 0.1 * noise
    elif name.endswith("embed_tokens.weight"):
        value = 0.1 * noise  # tied: logits of order 1
    else:
        value = noise / math.sqrt(shape[-1])
    return value.to(torch.bfloat16)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
