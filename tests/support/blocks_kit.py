"""Random models of transformers and our trunk on the same weights; nothing of core's loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from qcore.api.blocks import Packed
from qcore_qwen35.model import Trunk

VOCAB = 97


def tiny_config(**changes: Any) -> dict[str, Any]:
    """The text section of a config.json: three delta layers, then one of attention."""
    layers = changes.pop("layers", ["linear_attention"] * 3 + ["full_attention"])
    return {
        "model_type": "qwen3_5_text",
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
        **changes,
    }


class GivenWeights:
    """A `BuildContext` over the state dict of a transformers model; everything is trainable."""

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.weights = weights
        self.kernels: dict[str, Any] = {}

    def linear(self, name: str) -> nn.Module:
        weight = self.weights[f"{name}.weight"]
        with torch.device("meta"):
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        made.weight = nn.Parameter(weight.detach())
        return made

    def tensor(self, name: str) -> nn.Parameter:
        return nn.Parameter(self.weights[name].detach())

    def stack(self, *linears: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda x: tuple(linear(x) for linear in linears)

    def kernel(self, op: str, reference: Any) -> Any:
        return self.kernels.get(op, reference)


@dataclass
class Twins:
    """The reference and ours; they share the memory of the weights, not the gradients."""

    theirs: Qwen3_5ForCausalLM
    ours: Trunk

    @property
    def head(self) -> Tensor:
        return self.theirs.lm_head.weight.detach()

    def logits(
        self, batch: Packed, embedded: Tensor | None = None, caches: list[Any] | None = None
    ) -> Tensor:
        """Our logits ``[T, V]``."""
        x = self.ours.embed(batch) if embedded is None else embedded
        for number, layer in enumerate(self.ours.layers):
            x = layer(x, batch, None if caches is None else caches[number])
        return self.ours.final(x) @ self.head.t()

    def reference(self, ids: Tensor, **more: Any) -> Tensor:
        """Their logits ``[T, V]`` of one unpadded document."""
        return self.theirs(ids[None], use_cache=False, **more).logits[0]


def twins(
    config: dict[str, Any], *, dtype: torch.dtype = torch.float32, attention: str = "eager"
) -> Twins:
    """Build both on random weights, far from where training starts."""
    torch.manual_seed(len(config["layer_types"]) + config["linear_num_value_heads"])
    hf_config = Qwen3_5TextConfig(**config)
    hf_config._attn_implementation = attention
    with torch.device("meta"):
        theirs = Qwen3_5ForCausalLM(hf_config)
    rotary = theirs.model.rotary_emb
    theirs.to_empty(device="cpu").eval()
    theirs.model.rotary_emb = type(rotary)(hf_config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            randomise(name, parameter)
    theirs.to(dtype)
    theirs.model.rotary_emb = type(rotary)(hf_config)
    return Twins(theirs, Trunk(GivenWeights(config, theirs.model.state_dict(), dtype)))


def randomise(name: str, parameter: Tensor) -> None:
    """Away from initial values, where a dropped term could hide (w = 0 hides 1 + w)."""
    if name.endswith("A_log"):
        parameter.uniform_(-3, 1.5)
    elif name.endswith("dt_bias"):
        parameter.normal_(0, 1)
    elif "conv1d" in name:
        parameter.normal_(0, 0.5)
    elif name.endswith("linear_attn.norm.weight"):
        parameter.normal_(1, 0.3)
    elif parameter.dim() == 1:
        parameter.normal_(0, 0.3)
    elif "embed_tokens" in name:
        parameter.normal_(0, 1)
    else:  # uniform with deviation 0.5 / sqrt(in): the fastest to draw, for real sizes
        parameter.uniform_(-1, 1).mul_((0.75 / parameter.shape[1]) ** 0.5)


def documents(*lengths: int, vocab: int = VOCAB, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    return [torch.randint(0, vocab, (n,), generator=generator) for n in lengths]


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    found, wanted = found.detach(), wanted.detach()
    scale = wanted.abs().max().clamp(min=1e-30)
    return float((found - wanted).abs().max() / scale)


class Written(TorchDispatchMode):
    """Counts the elements that operations produce, views left out: a clock that cannot jitter."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.largest = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        if not func.is_view:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.elements += leaf.numel()
                    self.largest = max(self.largest, leaf.numel())
        return out
