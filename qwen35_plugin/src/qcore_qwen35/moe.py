"""The mixture-of-experts layer of Qwen 3.5: router, routed experts, shared expert, balance loss.

This file decides how experts are selected and weighted, and what the load-balancing loss reads.
Core sorts rows by expert and multiplies them (`BuildContext.experts`): the cost is that of the
routed tokens. `ops.moe` computes what lies between the two linear layers of an expert: the routing
weight multiplies the input of the last layer, which is linear, so its output need not be saved.

The load-balancing loss is that of Switch Transformers (Fedus et al. 2021, section 2.2) as
transformers computes it, over the rows of all layers at once: ``E * sum_e f_e P_e`` with f_e
the share of rows routed to e (k in total) and P_e the mean of its probability.

Shapes: T tokens, H hidden size, E experts, k experts per token, I an expert's inner size.
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
    """Router statistics of one layer for the balance loss: sums over its tokens, ``[E]`` each."""

    picked: Tensor
    probability: Tensor
    tokens: int


class Experts(nn.Module):
    """The routed experts: two stacks of linear layers, named as in the table."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

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
    """The shared expert, which all tokens use; ``forward`` applies it without its gate."""

    def __init__(self, ctx: BuildContext, name: str) -> None:
        super().__init__(ctx, name)
        self._shared_up = ctx.kernel("qwen35::moe_shared_up", shared_up)

    def gated(self, gate: Tensor, up: Tensor, score: Tensor) -> Tensor:
        """Gated output from the first layers' outputs: ``[T, I], [T, I], [T, 1] -> [T, H]``."""
        return self.down_proj(recompute(self._shared_up, gate, up, score))


class Moe(nn.Module):
    """``[T, H] -> [T, H]``."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

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
    """`route`, with probabilities summed over tokens: ``[E]`` float32."""
    weights, chosen, probabilities = route(scores, k)
    return weights, chosen, probabilities.sum(0)


def routing_of(chosen: Tensor, experts: int) -> Routing:
    """The `Routing` of the experts ``[T, k]`` selected for each token."""
    return Routing.of(chosen, experts)


def route(scores: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Select the experts of each token by router scores ``[T, E]``.

    Returns:
        Weights ``[T, k]`` in the dtype of the scores, which sum to one before rounding;
        experts ``[T, k]``; probabilities ``[T, E]`` float32.
    """
    probabilities = F.softmax(scores, -1, dtype=torch.float32)
    weights, chosen = torch.topk(probabilities, k, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(scores.dtype), chosen, probabilities


def balance_loss(kept: Mapping[str, Any]) -> Tensor:
    """The load-balancing loss of a batch; k for perfectly even routing."""
    return _loss([value for key, value in kept.items() if key.startswith(_KEPT)])


def _loss(layers: Iterable[Balance]) -> Tensor:
    layers = list(layers)
    rows = sum(layer.tokens for layer in layers)
    picked = torch.stack([layer.picked for layer in layers]).sum(0).float() / rows
    probability = torch.stack([layer.probability for layer in layers]).sum(0) / rows
    return len(picked) * (picked * probability).sum()
