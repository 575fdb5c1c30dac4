"""The trunk of Qwen 3.5: token embedding, residual decoder layers, final norm.

This file decides the order of blocks and their parameter names (those of the table, without its
root). Core computes head and loss; the blocks are in `delta`, `attention`, `mlp` and `moe`.
`guards` has already refused any config that the blocks do not support.

Shapes: T tokens of all documents, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.api import BuildContext, DecodeCache, Packed
from qcore.api import Trunk as TrunkProtocol

from .attention import Attention, KvCache
from .delta import DeltaCache, GatedDeltaNet
from .mlp import Mlp
from .moe import Moe, balance_loss
from .norm import RmsNorm, Weight
from .table import layer_types, text_config

Cache = KvCache | DeltaCache


class DecoderLayer(nn.Module):
    """``x += mixer(norm(x)); x += mlp(norm(x))``; the layer type selects the mixer."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(
            self, x: Tensor, batch: Packed, cache: DecodeCache | None = None
        ) -> Tensor: ...

    def __init__(self, ctx: BuildContext, text: Mapping[str, Any], kind: str, number: int) -> None:
        super().__init__()
        name, eps = f"layers.{number}", text["rms_norm_eps"]
        self.kind = kind
        self.input_layernorm = RmsNorm(ctx, f"{name}.input_layernorm", eps)
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(ctx, text, f"{name}.linear_attn")
        else:
            self.self_attn = Attention(ctx, text, f"{name}.self_attn")
        self.post_attention_layernorm = RmsNorm(ctx, f"{name}.post_attention_layernorm", eps)
        sparse = "num_experts" in text
        self.mlp = Moe(ctx, text, f"{name}.mlp") if sparse else Mlp(ctx, f"{name}.mlp")

    @property
    def mixer(self) -> GatedDeltaNet | Attention:
        """The token mixer of this layer."""
        return self.linear_attn if self.kind == "linear_attention" else self.self_attn

    def forward(self, x: Tensor, batch: Packed, cache: DecodeCache | None = None) -> Tensor:
        x, y = self.input_layernorm.after(x)
        x, y = self.post_attention_layernorm.after(x, self.mixer(y, batch, cache))
        return x + (self.mlp(y, batch) if isinstance(self.mlp, Moe) else self.mlp(y))

    def new_cache(self, tokens: int, device: torch.device) -> Cache:
        """A cache for decoding one document of at most `tokens` tokens."""
        return self.mixer.new_cache(tokens, device)


class Trunk(nn.Module):
    """The model between token ids and head.

    Attributes:
        layers: an ``nn.ModuleList``, annotated with its element type.
    """

    layers: Sequence[DecoderLayer]

    def __init__(self, ctx: BuildContext) -> None:
        super().__init__()
        text = text_config(ctx.config)
        self.dtype = ctx.dtype
        self.embed_tokens = Weight(ctx.tensor("embed_tokens.weight"))
        kinds = enumerate(layer_types(text))
        blocks = nn.ModuleList(DecoderLayer(ctx, text, kind, number) for number, kind in kinds)
        self.add_module("layers", blocks)
        self.norm = RmsNorm(ctx, "norm", text["rms_norm_eps"])

    def embed(self, batch: Packed) -> Tensor:
        """Token embeddings, unscaled: ``ids [T] -> [T, H]``."""
        return F.embedding(batch.ids, self.embed_tokens.weight).to(self.dtype)

    def final(self, x: Tensor) -> Tensor:
        """The final norm: ``[T, H] -> [T, H]``."""
        return self.norm(x)

    def aux_loss(self, batch: Packed) -> Tensor | None:
        """The load-balancing loss; ``None`` for a dense model."""
        return balance_loss(batch.kept()) if batch.kept() else None


def build(ctx: BuildContext) -> TrunkProtocol:
    """Build the trunk that the config in `ctx` describes."""
    return Trunk(ctx)
