"""What a layer reads in the streams of `qcore.merging.streams`: base, base + adapter, and merge.

Shapes: T tokens, H hidden size, n outputs of a tower.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The input of a layer in each stream; that of the base may have fewer rows."""

    base: Tensor
    adapted: Tensor
    merged: Tensor


def with_media(x: Inputs, media: Inputs, tokens: int) -> Inputs:
    """Replace embeddings of the first document, except the last, by the outputs of a tower.

    So the tower has an effect on logits, as media in a row have.

    Args:
        x: embeddings ``[T, H]``.
        media: outputs of the tower ``[n, H]``.
        tokens: of the first document.
    """

    def put(embeddings: Tensor, outputs: Tensor) -> Tensor:
        count = min(len(outputs), tokens - 1)
        return torch.cat([outputs[:count], embeddings[count:]])

    return Inputs(*(put(one, outputs) for one, outputs in zip(x, media, strict=True)))
