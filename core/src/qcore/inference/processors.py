"""Changes logits before a token is chosen: penalties, temperature, top-k, top-p, min-p.

This file decides the arithmetic and the order, which are those of transformers: repetition
penalty, temperature, top-k, top-p, min-p. Presence and frequency penalties, which transformers
lacks, follow the repetition penalty, as in vLLM. Which values apply is decided in
`generation_config`, which token follows in `sampling`.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .generation_config import Sampling


class Penalties:
    """The tokens that a document holds so far, and what they cost.

    Nothing here waits for the device, and without penalties nothing is computed.

    Args:
        sampling: the penalties.
        prompt: ids of the prompt; the repetition penalty counts them.
        size: V.
        device: of the logits.
    """

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], size: int, device: torch.device
    ) -> None:
        self.sampling = sampling
        if not sampling.penalizes:
            return
        self.there = torch.zeros(size, dtype=torch.bool, device=device)
        self.there[torch.tensor([*prompt], dtype=torch.int64, device=device)] = True
        self.counts = torch.zeros(size, device=device)

    def add(self, token: Tensor) -> None:
        """Count a token ``[1]`` of the answer."""
        if not self.sampling.penalizes:
            return
        self.there.index_fill_(0, token, True)
        self.counts.index_add_(0, token, self.counts.new_ones(1))

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits ``[V]`` after penalties."""
        sampling = self.sampling
        if (penalty := sampling.repetition_penalty) != 1:
            changed = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.there, changed, logits)
        if sampling.frequency_penalty:
            logits = logits - sampling.frequency_penalty * self.counts
        if sampling.presence_penalty:
            logits = logits - sampling.presence_penalty * (self.counts > 0)
        return logits


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits ``[V]`` from whose softmax a token is drawn; -inf where it may not be drawn."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        # Ascending, as in transformers: of equal logits both keep the same ones.
        ordered, index = logits.sort()
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        drop[-1] = False
        logits = logits.masked_fill(drop.scatter(0, index, drop), -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        least = sampling.min_p * probabilities.amax()
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    return logits
