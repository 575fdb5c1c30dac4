"""What a rank holds of a base that is sharded over ranks, and what gathering its layers costs.

This file decides which bytes are sharded (of each layer of the trunk the weights of its linear maps
and experts, and other frozen tensors from `LEAST` bytes up), that two layers at a time are gathered
(the one that runs, and the one that runs next, which is on its way), and how much of gathering is
hidden behind compute. Embeddings, the head, adapters and a tower are whole on every rank.

A layer is gathered once in forward and once in backward, into one buffer, and copied from there to
its own tensors, on the stream that computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from ..nn.model import Model
from ..nn.qlora.lora_layer import LoraLayer
from ..nn.sharding.base import LEAST
from .gpus import BYTES, Card
from .links import Gathers, Ranks

#: Fraction of the time of a gather by which the layer beside it gets slower: NCCL's kernels take
#: multiprocessors and memory bandwidth. Measured on two H200 (2026-11): sharded steps of the 9B,
#: 27B and 397B at 1 x 8192 take 0.023, 0.078 and 0.6 s longer.
BESIDE = 0.8
#: Seconds of the host for one gather of a layer; measured on the same steps of the 9B and 27B.
HOST = 0.9e-3
GATHERED = "gathered layers"  #: memory term of the layers that are gathered


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """The layers of a base that are sharded.

    Attributes:
        ranks: the ranks that hold the shards.
        terms: bytes of the sharded tensors of each layer, whole, by memory term.
    """

    ranks: Ranks
    terms: tuple[Mapping[str, int], ...]

    @property
    def layers(self) -> list[int]:
        """Bytes of the sharded tensors of each layer, whole."""
        return [sum(terms.values()) for terms in self.terms]

    @property
    def saved(self) -> Mapping[str, int]:
        """Bytes that a rank does not hold, by term; the largest shard counts."""
        saved: Counter[str] = Counter()
        for terms in self.terms:
            for term, size in terms.items():
                saved[term] += size - -(-size // self.ranks.size)
        return saved

    def gathered(self, number: int, ahead: int) -> int:
        """Return the bytes of gathered layers while layer `number` runs.

        Args:
            number: the layer that runs.
            ahead: 1 in forward, -1 in backward: the next layer is the one above or below.
        """
        layers, other = self.layers, number + ahead
        return layers[number] + (layers[other] if 0 <= other < len(layers) else 0)

    @property
    def most(self) -> int:
        """Bytes of gathered layers at most."""
        return max(self.gathered(number, 1) for number in range(len(self.terms)))

    def gathers(self, compute: Sequence[tuple[float, float]], card: Card) -> Gathers:
        """Return what the all-gathers of a micro-step cost on the GPU.

        Args:
            compute: seconds of forward and backward of each layer.
            card: the GPU, whose memory bandwidth bounds the copies.
        """
        layers = self.layers
        each = [self.ranks.all_gather(size) for size in layers]

        def slowed(gather: float, seconds: float) -> float:
            return max(gather - seconds, BESIDE * gather)

        # The gather of the next layer runs beside a layer; nothing runs beside the first one.
        forward = each[0] + sum(
            slowed(gather, seconds) for gather, (seconds, _) in zip(each[1:], compute, strict=False)
        )
        backward = each[-1] + sum(
            slowed(gather, seconds) for gather, (_, seconds) in zip(each, compute[1:], strict=False)
        )
        copies = 2 * 2 * sum(layers) / (card.bandwidth * BYTES)
        return Gathers(2 * sum(layers), 2 * sum(each), forward + backward + copies)

    @property
    def host(self) -> float:
        """Seconds of the host for the gathers of a micro-step."""
        return 2 * len(self.terms) * HOST


def sharded_terms(model: Model) -> tuple[Mapping[str, int], ...]:
    """Return the bytes of each layer of the trunk that are sharded, by memory term."""
    return tuple(_of_layer(cast(nn.Module, layer)) for layer in model.trunk.layers)


def _of_layer(layer: nn.Module) -> Counter[str]:
    terms: Counter[str] = Counter()
    for module in layer.modules():
        lora = isinstance(module, LoraLayer)
        if isinstance(module, LoraLayer) and module.four_bit:
            terms["weights nf4"] += module.stored_bytes
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and (lora or parameter.nbytes >= LEAST):
                wide = parameter.element_size() == 4
                terms["weights fp32" if wide else "weights 16 bit"] += parameter.nbytes
    return terms
