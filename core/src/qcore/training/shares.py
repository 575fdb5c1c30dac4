"""Which packs of a step a rank runs.

This file decides that all ranks together run the micro-batches of a step, each on one rank, and
that a rank joins only its own. It depends on the step and the number of ranks alone. Which rows a
micro-batch has is up to `data.sampler`, how micro-batches are spread and joined, to
`data.microbatches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.dataset import Dataset
from ..data.microbatches import cost, joined, spread
from ..data.sampler import Schedule
from ..parallel.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A step and what a rank computes of it.

    Attributes:
        step: number of the step, from 0.
        rows: samples of the whole step.
        packs: samples of each pack of this rank.
        count: packs of the whole step; with several ranks, before they are joined.
        rounds: packs of the rank that has the most.
        supervised: tokens with a label, of the whole step.
        tokens: of the whole step.
        own: tokens of this rank.
    """

    step: int
    rows: Sequence[int]
    packs: Sequence[Sequence[int]]
    count: int
    rounds: int
    supervised: int
    tokens: int
    own: int


class Shares:
    """The steps of a run, as a rank sees them.

    Args:
        data: the rows.
        schedule: the micro-batches of each step.
        together: size limit of a pack; 0: each micro-batch runs alone.
        world: the ranks.
    """

    def __init__(self, data: Dataset, schedule: Schedule, together: int, world: World) -> None:
        self._schedule = schedule
        self._lengths, self._units = data.train.lengths, data.train.units
        self._supervised = np.asarray(data.train.column("supervised"), np.int64)
        self.together = together
        self._world = world

    def of(self, step: int) -> Share:
        """The share of a step, from 0."""
        packs = self._schedule.micro_batches(step)
        rows = [row for pack in packs for row in pack]
        count = len(packs)
        everyone = [packs]
        if self._world.size > 1:
            costs = [cost(*self._size(pack)) for pack in packs]
            everyone = [[packs[n] for n in own] for own in spread(costs, self._world.size)]
        if self.together:
            everyone = [joined(own, self._lengths, self.together, self._units) for own in everyone]
        packs = everyone[self._world.rank]
        return Share(
            step=step,
            rows=rows,
            packs=packs,
            count=count if self._world.size > 1 else len(packs),
            rounds=max(map(len, everyone)),
            supervised=int(self._supervised[rows].sum()),
            tokens=sum(self._lengths[row] for row in rows),
            own=sum(self._lengths[row] for pack in packs for row in pack),
        )

    def _size(self, pack: Sequence[int]) -> tuple[list[int], int]:
        """Lengths of the rows of a pack, and their media units."""
        units = sum(self._units[row] for row in pack) if self._units else 0
        return [self._lengths[row] for row in pack], units
