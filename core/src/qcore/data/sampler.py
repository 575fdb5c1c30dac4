"""Which samples make up an optimizer step, as a pure function of the step.

This file decides the order of samples and their micro-batches. An epoch is a permutation of the
rows, and a row's samples follow each other, so that each row is trained exactly once an epoch. A
step is a fixed number of samples or, with ``tokens_per_step``, of whole rows with about so many
tokens. It keeps no state, so resuming needs none, and the same seed gives the same samples on any
machine. The learning rate is decided by `training.lr_schedule`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.settings import Settings

_Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The samples of an epoch.

    Attributes:
        number: of the epoch, from 0; -1: none.
        samples: in order.
        cuts: where each step begins, and the number of samples; empty: steps of a fixed number.
    """

    number: int
    samples: _Numbers
    cuts: _Numbers


class Schedule:
    """The steps of a run.

    With ``tokens_per_step`` an epoch has as many steps as there are such amounts of tokens in it,
    rounded; every epoch has the same number. A row belongs to the step in whose share of the
    epoch's tokens its middle lies, so that steps differ from the mean by at most a row, and every
    step has one.

    Args:
        rows: samples of each training row; an integer: so many rows of one sample.
        settings: batch sizes, epochs or steps, seed.
        lengths: tokens of each sample; needed with ``tokens_per_step`` only.

    Attributes:
        samples: number of training samples.
        steps_per_epoch: optimizer steps per epoch; without ``tokens_per_step`` the last one may be
            smaller.
    """

    def __init__(
        self, rows: int | Sequence[int], settings: Settings, lengths: Sequence[int] = ()
    ) -> None:
        self.settings = settings
        sizes = np.ones(rows, np.int64) if isinstance(rows, int) else np.array(rows, np.int64)
        self._sizes = sizes
        self._starts: _Numbers = np.cumsum(sizes) - sizes
        self.samples = int(sizes.sum())
        self._tokens: _Numbers = np.empty(0, np.int64)
        if settings.tokens_per_step:
            assert len(lengths) == self.samples, "tokens_per_step needs the length of each sample"
            self._tokens = np.add.reduceat(np.asarray(lengths, np.int64), self._starts)
            steps = round(int(self._tokens.sum()) / settings.tokens_per_step)
            self.steps_per_epoch = max(1, min(steps, len(sizes)))
        else:
            self.steps_per_epoch = math.ceil(self.samples / self.per_step)
        self._epoch = _Epoch(-1, self._starts, self._starts)

    @property
    def per_step(self) -> int:
        """Samples per full optimizer step without ``tokens_per_step``."""
        s = self.settings
        return s.per_device_train_batch_size * s.gradient_accumulation_steps

    @property
    def total(self) -> int:
        """Optimizer steps of the run."""
        if self.settings.max_steps > 0:
            return self.settings.max_steps
        return max(1, math.ceil(self.settings.num_train_epochs * self.steps_per_epoch))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Samples of step `step` (from 0), one list per micro-batch."""
        number, slot = divmod(step, self.steps_per_epoch)
        epoch = self._of(number)
        if len(epoch.cuts):
            start, stop = epoch.cuts[slot : slot + 2].tolist()
        else:
            start, stop = slot * self.per_step, (slot + 1) * self.per_step
        samples: list[int] = epoch.samples[start:stop].tolist()
        size = self.settings.per_device_train_batch_size
        return [samples[at : at + size] for at in range(0, len(samples), size)]

    def _of(self, number: int) -> _Epoch:
        """An epoch, kept for its steps."""
        if self._epoch.number != number:
            seed = seed_of(self.settings.seed, "order", number)
            rows = _permutation(len(self._sizes), seed)
            sizes = self._sizes[rows]
            ends = np.cumsum(sizes)
            # Of each row its first sample, then the following ones.
            samples = np.repeat(self._starts[rows] - (ends - sizes), sizes)
            samples += np.arange(self.samples)
            cuts: _Numbers = np.empty(0, np.int64)
            if self.settings.tokens_per_step:
                ends = np.concatenate([[0], ends])
                cuts = ends[_row_cuts(self._tokens[rows], self.steps_per_epoch)]
            self._epoch = _Epoch(number, samples, cuts)
        return self._epoch


def _row_cuts(tokens: _Numbers, steps: int) -> _Numbers:
    """Where each step begins among the rows of an epoch, and the number of rows.

    Args:
        tokens: of each row, in the order of the epoch.
        steps: of the epoch; at most the number of rows.
    """
    ends, rows = np.cumsum(tokens), len(tokens)
    # Twice the middle of each row, and twice the share of each step, times the number of steps:
    # whole numbers, so that every machine cuts alike.
    middles = (2 * ends - tokens) * steps
    inner = np.arange(1, steps)
    cuts = np.searchsorted(middles, 2 * inner * ends[-1])
    # Every step has a row: cut number k lies between k and rows - steps + k, and no two are equal.
    cuts = np.minimum(np.maximum.accumulate(np.maximum(cuts - inner, 0)), rows - steps) + inner
    return np.concatenate([[0], cuts, [rows]])


def rows_per_step(settings: Settings) -> int:
    """Rows of a step if every row is one sample of ``max_length`` tokens."""
    if settings.tokens_per_step:
        return max(1, round(settings.tokens_per_step / settings.max_length))
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps


def _permutation(rows: int, seed: int) -> NDArray[Any]:
    import torch

    order: NDArray[Any] = torch.randperm(
        rows, generator=torch.Generator().manual_seed(seed)
    ).numpy()
    return order


def seed_of(seed: int, *what: object) -> int:
    """A seed for one purpose, independent of the others."""
    digest = hashlib.sha256(":".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
