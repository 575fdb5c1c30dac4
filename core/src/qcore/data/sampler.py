"""Which samples make up an optimizer step, as a pure function of the step.

This file decides the order of samples and their micro-batches. A step is a fixed number of
samples. An epoch is a permutation of the rows, and a row's samples follow each other, so that each
row is trained exactly once an epoch. There is no state, so resuming needs none, and the same seed
gives the same samples on any machine. The learning rate is decided by `training.lr_schedule`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import accumulate

from ..config.settings import Settings


class Schedule:
    """The steps of a run.

    Args:
        rows: samples of each training row; an integer: so many rows of one sample.
        settings: batch sizes, epochs or steps, seed.

    Attributes:
        samples: number of training samples.
    """

    def __init__(self, rows: int | Sequence[int], settings: Settings) -> None:
        self.settings = settings
        sizes = None if isinstance(rows, int) or all(size == 1 for size in rows) else tuple(rows)
        self._rows = rows if isinstance(rows, int) else len(rows)
        self._starts = None if sizes is None else list(accumulate(sizes, initial=0))
        self.samples = self._rows if self._starts is None else self._starts[-1]
        self._epoch: tuple[int, list[int]] = (-1, [])

    @property
    def per_step(self) -> int:
        """Samples per full optimizer step."""
        s = self.settings
        return s.per_device_train_batch_size * s.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last one may be smaller."""
        return math.ceil(self.samples / self.per_step)

    @property
    def total(self) -> int:
        """Optimizer steps of the run."""
        if self.settings.max_steps > 0:
            return self.settings.max_steps
        return max(1, math.ceil(self.settings.num_train_epochs * self.steps_per_epoch))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Samples of step `step` (from 0), one list per micro-batch."""
        epoch, slot = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        samples = order[slot * self.per_step : (slot + 1) * self.per_step]
        size = self.settings.per_device_train_batch_size
        return [samples[at : at + size] for at in range(0, len(samples), size)]

    def _order(self, epoch: int) -> list[int]:
        """The samples of an epoch in order, kept for its steps."""
        if self._epoch[0] != epoch:
            rows = _permutation(self._rows, seed_of(self.settings.seed, "order", epoch))
            starts = self._starts
            if starts is not None:
                rows = [n for row in rows for n in range(starts[row], starts[row + 1])]
            self._epoch = epoch, rows
        return self._epoch[1]


def _permutation(rows: int, seed: int) -> list[int]:
    import torch

    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()


def seed_of(seed: int, *what: object) -> int:
    """A seed for one purpose, independent of the others."""
    digest = hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
