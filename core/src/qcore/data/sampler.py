"""Which rows make up an optimizer step, as a pure function of the step.

This file decides the order of rows and their micro-batches. There is no state, so resuming needs
none, and the same seed gives the same rows on any machine. The learning rate is decided by
`training.lr_schedule`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

from ..config.settings import Settings


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of a run over `rows` training rows.

    Attributes:
        rows: number of training rows.
        settings: batch sizes, epochs or steps, seed.
    """

    rows: int
    settings: Settings

    @property
    def per_step(self) -> int:
        """Rows per full optimizer step."""
        s = self.settings
        return s.per_device_train_batch_size * s.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last one may be smaller."""
        return math.ceil(self.rows / self.per_step)

    @property
    def total(self) -> int:
        """Optimizer steps of the run."""
        if self.settings.max_steps > 0:
            return self.settings.max_steps
        return max(1, math.ceil(self.settings.num_train_epochs * self.steps_per_epoch))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Rows of step `step` (from 0), one list per micro-batch."""
        epoch, slot = divmod(step, self.steps_per_epoch)
        order = _order(self.rows, seed_of(self.settings.seed, "order", epoch))
        rows = order[slot * self.per_step : (slot + 1) * self.per_step]
        size = self.settings.per_device_train_batch_size
        return [rows[at : at + size] for at in range(0, len(rows), size)]


@lru_cache(maxsize=1)
def _order(rows: int, seed: int) -> list[int]:
    """The permutation of an epoch, cached for its steps."""
    import torch

    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()


def seed_of(seed: int, *what: object) -> int:
    """A seed for one purpose, independent of the others."""
    digest = hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
