"""What is put through a slice, and through whom: documents, decays, and picked experts.

This file decides the tokens, so that `gradient_slices` and `gradient_twin` compute the same; it
knows no model.

Experts are picked by scores: `Routes` notes who was picked, and can say who is to be. The others'
scores are then pushed far down, which changes no weight (the picked ones' sum to one) and no
gradient (that of a score that is not picked is zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

VOCABULARY = 1024
FAR = -1e4  #: what stands for a score that must not be picked

Gradients = dict[str, Tensor]  #: by canonical name of the weight and side, ``NAME A``


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is put through a slice.

    Attributes:
        lengths: tokens of each document.
        padded: to so many tokens each, the rest without a target; 0: packed end to end.
        decay: ``usual``; ``forgets``: factors near 0; ``keeps``: factors near 1.
        seed: of tokens, targets and B.
    """

    lengths: tuple[int, ...] = (1000, 1, 77, 333)
    padded: int = 0
    decay: str = "usual"
    seed: int = 0

    def documents(self) -> list[tuple[Tensor, Tensor]]:
        """Ids and targets of each document ``[t]``; one target in five is left out."""
        draw = torch.Generator().manual_seed(100 + self.seed)
        found = []
        for n in self.lengths:
            ids, targets = torch.randint(0, VOCABULARY, (2, n), generator=draw)
            if n > 1:
                targets[torch.rand(n, generator=draw) < 0.2] = -100
            found.append((ids, targets))
        return found

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """Documents, filled up where they are padded."""
        more = [max(0, self.padded - n) for n in self.lengths]
        return [
            (torch.cat([ids, ids.new_zeros(n)]), torch.cat([want, want.new_full((n,), -100)]))
            for (ids, want), n in zip(self.documents(), more, strict=True)
        ]

    def real(self) -> Tensor:
        """``[T]`` bool: which tokens of the rows are no padding."""
        longs = [max(self.padded, n) for n in self.lengths]
        return torch.cat([torch.arange(m) < n for n, m in zip(self.lengths, longs, strict=True)])


@dataclass(slots=True)
class Routes:
    """Who was picked, and who is to be: by layer, the experts ``[T, k]`` of all tokens in turn.

    Attributes:
        forced: who is to be picked; ``None``: whoever the scores say.
        taken: who was, in as many pieces as the tokens came in.
        at: tokens that came before this piece.
    """

    forced: Sequence[Tensor] | None = None
    taken: dict[int, list[Tensor]] = field(default_factory=dict)
    at: int = 0

    def mask(self, layer: int, scores: Tensor) -> Tensor:
        """Scores ``[T, E]`` by which only those are picked that are to be."""
        if self.forced is None:
            return scores
        chosen = self.forced[layer][self.at : self.at + len(scores)]
        open_ = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        return scores.masked_fill(~open_.scatter_(1, chosen.to(scores.device), True), FAR)

    def note(self, layer: int, chosen: Tensor) -> None:
        """Who was picked of the next tokens."""
        self.taken.setdefault(layer, []).append(chosen.detach())

    def by_layer(self) -> list[Tensor]:
        """What was noted, pieces joined."""
        return [torch.cat(self.taken[layer]) for layer in sorted(self.taken)]
