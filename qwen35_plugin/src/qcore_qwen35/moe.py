"""Mixture of experts: a router, the experts that it picks, and an expert that all tokens share.

This file decides how experts are picked and weighted, what lies between their two maps, and
what is left for the load-balancing loss. Rows are sorted by expert and multiplied by core
(`qcore.nn.experts`): the cost is that of the routed tokens.

The load-balancing loss is that of Switch Transformers (Fedus et al. 2021, section 2.2) as
transformers computes it, over the rows of all layers at once: ``E * sum_e f_e P_e`` with f_e
the share of rows that picked e (k in all) and P_e the mean of its probability.

Shapes: T tokens, H hidden size, E experts, k picked, I an expert's inner size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.nn.experts import Routing
from qcore.nn.protocols import BuildContext, Packed

from .mlp import Mlp, gated_up

_KEPT = "router of layer "


class Balance(NamedTuple):
    """What one layer's router leaves: sums over its tokens, ``[E]`` each, and their number."""

    picked: Tensor
    probability: Tensor
    tokens: int


class Experts(nn.Module):
    """The two stacks of maps, under the names that the table gives them."""

    def __init__(self, ctx: BuildContext, name: str) -> None:
        super().__init__()
        self.gate_up_proj = ctx.experts(f"{name}.gate_up_proj")
        self.down_proj = ctx.experts(f"{name}.down_proj")

    def forward(self, rows: Tensor, routing: Routing) -> Tensor:
        """``[T k, H] -> [T k, H]``, rows sorted by expert."""
        out: Tensor = self.down_proj(gated_up(self.gate_up_proj(rows, routing)), routing)
        return out


class Moe(nn.Module):
    """``[T, H] -> [T, H]``."""

    def __init__(self, ctx: BuildContext, text: Mapping[str, Any], name: str) -> None:
        super().__init__()
        self.name = name
        self.k: int = text["num_experts_per_tok"]
        self.gate = ctx.linear(f"{name}.gate")
        self.experts = Experts(ctx, f"{name}.experts")
        self.shared_expert = Mlp(ctx, f"{name}.shared_expert")
        self.shared_expert_gate = ctx.linear(f"{name}.shared_expert_gate")

    def forward(self, x: Tensor, batch: Packed) -> Tensor:
        weights, chosen, probabilities = route(self.gate(x), self.k)
        routing = Routing.of(chosen, probabilities.shape[-1])
        balance = Balance(routing.counts, probabilities.sum(0), len(x))
        batch.keep(_KEPT + self.name, balance)
        routed = routing.combine(self.experts(routing.gather(x), routing), weights)
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        out: Tensor = routed + shared
        return out


def route(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Who gets each token, by scores ``[T, E]``.

    Returns:
        Weights ``[T, k]`` in the dtype of the scores, which sum to one before they are rounded;
        experts ``[T, k]``; probabilities ``[T, E]`` float32.
    """
    probabilities = F.softmax(scores, -1, dtype=torch.float32)
    weights, chosen = torch.topk(probabilities, k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(scores.dtype), chosen, probabilities


def balance_loss(kept: Mapping[str, Any]) -> Tensor:
    """The load-balancing loss of what the layers of a batch left; k when all is even."""
    return _loss([value for key, value in kept.items() if key.startswith(_KEPT)])


def _loss(layers: Iterable[Balance]) -> Tensor:
    layers = list(layers)
    rows = sum(layer.tokens for layer in layers)
    picked = torch.stack([layer.picked for layer in layers]).sum(0).float() / rows
    probability = torch.stack([layer.probability for layer in layers]).sum(0) / rows
    return len(picked) * (picked * probability).sum()
