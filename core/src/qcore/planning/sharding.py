"""What a rank holds of a base that is sharded over ranks, and what gathering its layers costs.

This file decides which bytes are sharded (the frozen 4-bit weights of the trunk's layers, with
their scales), that two layers at a time are gathered (the one that runs and the next one, which is
prefetched), and how much of gathering is hidden behind compute. Embeddings, norms, adapters and a
tower are whole on every rank.

A layer is gathered once in forward and once in backward, in one buffer, and copied from there to
its own tensors, on the stream that computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from ..nn.model import Model
from ..nn.qlora.lora_layer import LoraLayer
from .gpus import BYTES, Card
from .links import Gathers, Ranks

GATHERED = "gathered layers"  #: memory term of the layers that are gathered


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The layers of a base that are sharded.

    Attributes:
        ranks: the ranks that hold the shards.
        layers: bytes of the sharded weights of each layer, whole.
    """

    ranks: Ranks
    layers: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Bytes that a rank does not hold; the largest shard counts."""
        return sum(size - -(-size // self.ranks.size) for size in self.layers)

    def gathered(self, number: int) -> int:
        """Return the bytes of gathered layers while layer `number` runs.

        In forward its buffer is freed with the next gather; in backward the layer below is
        gathered already.
        """
        own = self.layers[number]
        return own + max(own, self.layers[number - 1] if number else 0)

    @property
    def most(self) -> int:
        """Bytes of gathered layers at most."""
        return max(map(self.gathered, range(len(self.layers))))

    def gathers(self, compute: Sequence[tuple[float, float]], card: Card) -> Gathers:
        """Return what the all-gathers of a micro-step cost.

        Args:
            compute: seconds of forward and backward of each layer.
            card: the GPU, whose memory bandwidth bounds the copies.
        """
        each = [self.ranks.all_gather(size) for size in self.layers]
        # The gather of the next layer runs beside a layer; nothing runs beside the first one.
        forward = each[0] + sum(
            max(0.0, gather - seconds)
            for gather, (seconds, _) in zip(each[1:], compute, strict=False)
        )
        backward = each[-1] + sum(
            max(0.0, gather - seconds)
            for gather, (_, seconds) in zip(each, compute[1:], strict=False)
        )
        copies = 2 * 2 * sum(self.layers) / (card.bandwidth * BYTES)
        return Gathers(2 * sum(self.layers), 2 * sum(each), forward + backward + copies)


def sharded_bytes(model: Model) -> tuple[int, ...]:
    """Return the bytes of each layer of the trunk that can be sharded: its 4-bit weights."""
    return tuple(
        sum(
            module.stored_bytes
            for module in cast(nn.Module, layer).modules()
            if isinstance(module, LoraLayer) and module.four_bit
        )
        for layer in model.trunk.layers
    )
