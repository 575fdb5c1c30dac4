"""LoRA's A and B of a fused product in the run's dtype, made again after each optimizer step.

This file decides when they are made again. A is ``[R, K]``, all members' below each other; B
``[N, R]`` is block-diagonal. Both are made in the run's dtype once per update of the trained
factors, B scaled before it is rounded. An update shows in the factors' tensor versions; torch's
fused optimizers do not bump these, so a factor that is not `Member.accumulates` counts as updated
whenever a forward follows a backward. How the matrices are multiplied is decided in `fused`.

Shapes: K in, N out of all members, R ranks of all members up to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .members import LoraFactors

_MULTIPLE = 8  # 16 bytes of a 16-bit dtype: rows that the matrix units' loads can start at


class WorkingFactors:
    """LoRA in the run's dtype: ``a [R, K]``, ``b [N, R]`` block-diagonal and scaled.

    After `update` both hold the values of the trained factors, unless `written` is false: then
    the next read of the weights writes them (`FusedKernels.fill`) and sets it.

    Args:
        out: N.
        into: K.

    Attributes:
        a: ``[R, K]``; without rows before the first update.
        b: ``[N, R]``, likewise.
        written: whether they hold their values.
        version: increases with each update that changes them.
    """

    def __init__(self, out: int, into: int) -> None:
        self._out, self._into = out, into
        self._stale, self.version = False, 0
        self._forget()

    def _forget(self) -> None:
        self._marks: list[tuple[Any, ...]] = []
        self.a = self.b = torch.empty(0, 0)
        self.written = False

    def note_backward(self, adapters: Sequence[LoraFactors]) -> None:
        """Record that a backward ran: an update of the factors may follow that leaves no trace."""
        self._stale = not all(factors.member.accumulates for factors in adapters)

    def note_forward(self) -> None:
        """Record that a forward begins."""
        if self._stale:
            self._forget()
            self._stale = False

    def update(self, adapters: Sequence[LoraFactors], like: Tensor, *, late: bool) -> None:
        """Make both from the trained factors, in the dtype of `like`, unless they are up to date.

        Args:
            adapters: at least one.
            like: a tensor of the dtype and device.
            late: whether the read of the weights that follows can write them.
        """
        marks = [factors.mark for factors in adapters]
        known = self.a.dtype == like.dtype and _same(self._marks, marks)
        if known and (self.written or late):
            return
        ranks = adapters[-1].ranks.stop
        ranks += -ranks % _MULTIPLE
        a, b = self.a, self.b
        if not late:
            a, b = like.new_zeros(ranks, self._into), like.new_zeros(self._out, ranks)
            for factors in adapters:
                a[factors.ranks] = factors.a
                torch.mul(factors.b, factors.scaling, out=b[factors.rows, factors.ranks])
        elif a.dtype != like.dtype or len(a) != ranks:
            # Otherwise in place, so that a captured step still finds them.
            a, b = like.new_empty(ranks, self._into), like.new_empty(self._out, ranks)
        self.a, self.b, self._marks, self.written = a, b, marks, not late
        self.version += 1


def _same(known: list[tuple[Any, ...]], marks: list[tuple[Any, ...]]) -> bool:
    """Whether all factors are the same objects in the same state; tensors compare by identity."""
    return len(known) == len(marks) and all(
        factors is other if isinstance(factors, Tensor) else factors == other
        for before, now in zip(known, marks, strict=True)
        for factors, other in zip(before, now, strict=True)
    )
