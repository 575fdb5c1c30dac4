"""Chooses each next token (greedy, or sampled) in the decoding loop.

This file decides which token follows (temperature 0: the most likely one; above 0: one drawn from
the softmax) and when decoding ends: at a stop token or after ``max_new_tokens``. How logits are
changed before is decided in `processors`, how they are computed in `decoder`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ..api.blocks import Media
from ..errors import NumericError
from .decoder import Decoder
from .generation_config import Sampling
from .processors import Penalties, warp

_GREEDY = Sampling()


@torch.inference_mode()
def decode(
    decoder: Decoder,
    ids: list[int],
    max_new_tokens: int,
    *,
    known: int,
    positions: Tensor | None = None,
    media: Media | None = None,
    stop: Collection[int | None] = (),
    sampling: Sampling = _GREEDY,
    seed: int = 0,
    source: object | None = None,
) -> tuple[list[int], bool]:
    """Continue a prompt.

    Args:
        decoder: of the model.
        ids: the prompt.
        max_new_tokens: the most tokens to add.
        known: ids from this one on are padding of the embedding and never sampled.
        positions: of the prompt, as for `Decoder.start`.
        media: what the tower reads for the prompt.
        stop: ids that end the document; ``None`` stands for a token that is not in the tokenizer.
        sampling: how a token follows from logits; greedy by default.
        seed: of the sampling.
        source: the model, for an error.

    Returns:
        The new ids, and whether a stop token was among them.

    Raises:
        NumericError: ``QC-GENERATE-002`` for logits that are not finite.
    """
    sampler = torch.Generator(decoder.device).manual_seed(seed)
    penalties = Penalties(sampling, ids, min(known, len(decoder.model.head)), decoder.device)
    new: list[int] = []
    fresh = torch.tensor(ids, device=decoder.device)
    while len(new) < max_new_tokens:
        if new:
            logits = decoder.next(fresh)[:known]
        else:
            logits = decoder.start(fresh, len(ids) + max_new_tokens, positions, media)[:known]
        finite = logits.isfinite().all()
        fresh = _pick(penalties(logits), finite, sampling, sampler)
        penalties.add(fresh)
        # The only synchronization of a token.
        token, good = torch.stack((fresh[0], finite.long())).tolist()
        if not good:
            raise NumericError(
                "QC-GENERATE-002",
                f"the logits are not finite after {decoder.done} tokens",
                file=source,
                fix="look at the adapter, or at the base with qcore inspect",
            )
        new.append(token)
        if token in stop:
            return new, True
    return new, False


def _pick(logits: Tensor, finite: Tensor, sampling: Sampling, sampler: torch.Generator) -> Tensor:
    """A token ``[1]``: the most likely, or sampled; any token where logits are not finite."""
    if sampling.temperature > 0:
        # multinomial would end the process with a device assertion on NaN.
        scores = warp(torch.where(finite, logits, 0.0), sampling)
        return torch.multinomial(scores.softmax(-1), 1, generator=sampler)
    return logits.argmax().reshape(1)
