"""Mixture of experts: a router, the experts that it picks, and an expert that all tokens share.

This file decides how experts are picked and weighted, and what is left for the load-balancing
loss. Rows are sorted by expert and multiplied by core (`BuildContext.experts`): the cost is that of
the routed tokens. What lies between two maps is `ops.moe`'s: a weight multiplies what goes into
the last map, which is linear, so that what comes out of it need not be kept.

The load-balancing loss is that of Switch Transformers (Fedus et al. 2021, section 2.2) as
transformers computes it, over the rows of all layers at once: ``E * sum_e f_e P_e`` with f_e
the share of rows that picked e (k in all) and P_e the mean of its probability.

Shapes: T tokens, H hidden size, E experts, k picked, I an expert's inner size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.api import BuildContext, Packed
from qcore.ops import Routing, recompute

from .mlp import Mlp
from .ops.moe.reference import shared_up, weighted_up

_KEPT = "router of layer "


class Balance(NamedTuple):
    """What one layer's router leaves: sums over its tokens, ``[E]`` each, and their number."""

    picked: Tensor
    probability: Tensor
    tokens: int


class Experts(nn.Module):
    """The two stacks of maps, under the names that the table gives them."""

    if TYPE_CHECKING:  # nn.Module's own is of any type

        def __call__(self, x: Tensor, weights: Tensor, routing: Routing) -> Tensor: ...

    def __init__(self, ctx: BuildContext, name: str) -> None:
        super().__init__()
        self.gate_up_proj = ctx.experts(f"{name}.gate_up_proj")
        self.down_proj = ctx.experts(f"{name}.down_proj")
        self._up = ctx.kernel("qwen35::moe_weighted_up", weighted_up)

    def forward(self, x: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        """``[T, H], [T, k] -> [T, H]``."""
        inner = self.gate_up_proj(x, routing, tokens="in")
        up = recompute(self._up, inner, weights, routing)
        return self.down_proj(up, routing, tokens="out")


class SharedExpert(Mlp):
    """The expert of all tokens: ``forward(x)`` is the map alone."""

    def __init__(self, ctx: BuildContext, name: str) -> None:
        super().__init__(ctx, name)
        self._shared_up = ctx.kernel("qwen35::moe_shared_up", shared_up)

    def gated(self, gate: Tensor, up: Tensor, score: Tensor) -> Tensor:
        """``[T, I], [T, I], [T, 1] -> [T, H]``: from what its first maps gave, weighted."""
        return self.down_proj(recompute(self._shared_up, gate, up, score))


class Moe(nn.Module):
    """``[T, H] -> [T, H]``."""

    if TYPE_CHECKING:  # nn.Module's own is of any type

        def __call__(self, x: Tensor, batch: Packed) -> Tensor: ...

    def __init__(self, ctx: BuildContext, text: Mapping[str, Any], name: str) -> None:
        super().__init__()
        self.name = name
        self.k: int = text["num_experts_per_tok"]
        self.gate = ctx.linear(f"{name}.gate")
        self.experts = Experts(ctx, f"{name}.experts")
        self.shared_expert = SharedExpert(ctx, f"{name}.shared_expert")
        self.shared_expert_gate = ctx.linear(f"{name}.shared_expert_gate")
        shared = self.shared_expert
        self._inputs = ctx.stack(shared.gate_proj, shared.up_proj, self.gate)
        self._router = ctx.kernel("qwen35::moe_router", router)
        self._routing = ctx.kernel("expert_routing", routing_of)

    def forward(self, x: Tensor, batch: Packed) -> Tensor:
        gate, up, scores = self._inputs(x)
        weights, chosen, probability = self._router(scores, self.k)
        routing = self._routing(chosen, len(probability))
        batch.keep(_KEPT + self.name, Balance(routing.counts, probability, len(x)))
        routed = self.experts(x, weights, routing)
        return routed + self.shared_expert.gated(gate, up, self.shared_expert_gate(x))


def router(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`route`, with the probabilities summed over tokens: ``[E]`` float32."""
    weights, chosen, probabilities = route(scores, k)
    return weights, chosen, probabilities.sum(0)


def routing_of(chosen: Tensor, experts: int) -> Routing:
    """Where rows go, by the experts ``[T, k]`` of each token."""
    return Routing.of(chosen, experts)


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
