"""Gathers the weights of a layer around its forward and its backward.

This file decides when. Before a layer runs, its weights are there and those of the next layer are
on their way; after it has run, only its shard remains. Backward is the same in the other order: a
hook on the layer's output runs once the gradient of the output is complete, before the layer's own
backward. What gathers is FSDP: `unshard` and `reshard` of one group for each layer, called
explicitly, because activation checkpointing runs the layer a second time inside its backward, where
FSDP's own hooks would gather once more.

Every rank gathers the same layers in the same order, whatever its rows are: one forward is layers
0 to n - 1, one backward is n - 1 down to the lowest layer that any rank might train through. A rank
with fewer packs than another, or one that stopped in the middle, gathers the rest in `complete`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Variable


class Handle(Protocol):
    """A gather on its way (`torch.distributed.fsdp.UnshardHandle`)."""

    def wait(self) -> None:
        """Put the whole weights in place."""
        ...


class Group(Protocol):
    """The sharded weights of a layer (`torch.distributed.fsdp.FSDPModule`)."""

    def unshard(self, async_op: bool = False) -> Handle | None:
        """Start to gather."""
        ...

    def reshard(self) -> None:
        """Keep the shard alone."""
        ...


class Gathers:
    """The order in which layers are gathered.

    Args:
        groups: of the layers, in order; ``None`` for a layer without sharded weights.
        lowest: the lowest layer that takes part in a backward, on any rank.
    """

    def __init__(self, groups: Sequence[Group | None], lowest: int = 0) -> None:
        self._groups = tuple(groups)
        self._lowest = lowest
        self._forward = list(range(len(groups)))
        self._round = [*self._forward, *range(len(groups) - 1, lowest - 1, -1)]
        self._coming: dict[int, Handle] = {}
        self._here: set[int] = set()
        self._started = 0  # gathers since the last `complete`
        self._at: int | None = None  # the layer whose backward runs

    def before(self, number: int) -> None:
        """Gather layer `number` for its forward."""
        if number == 0 and torch.is_grad_enabled():
            self._catch_up(-(-self._started // len(self._round)), self._round)
        self._turn_to(number, number + 1)

    def after(self, number: int, y: Tensor) -> Tensor:
        """The output of layer `number`, whose forward is over."""
        self._drop(number)
        if torch.is_grad_enabled() and y.requires_grad:
            y.register_hook(partial(self._backward_of, number))
        return y

    def complete(self, rounds: int, *, backward: bool = True) -> None:
        """Gather what is left of `rounds` forwards, each with its backward, and keep the shards.

        Every rank calls this after it ran its packs, or failed: with the number of packs of the
        rank that has the most.

        Args:
            rounds: forwards since the last call, on the rank that ran the most.
            backward: whether each of them had a backward.
        """
        self._at = None
        self._catch_up(rounds, self._round if backward else self._forward)
        self._started = 0

    @contextmanager
    def gathered(self, number: int) -> Iterator[None]:
        """Context in which the weights of a layer are there, on every rank."""
        started = self._started
        self._turn_to(number, None)
        try:
            yield
        finally:
            self._drop(number)
            self._started = started

    def _catch_up(self, rounds: int, script: Sequence[int]) -> None:
        """Gather what is left of `rounds` times the layers of `script`; drop all."""
        for number in sorted(self._coming):
            self._gather(number)
        self._turn_to(None, None)
        while self._started < rounds * len(script):
            number = script[self._started % len(script)]
            self._gather(number)
            self._drop(number)

    def _backward_of(self, number: int, _: Tensor) -> None:
        if self._at is None:
            # Inputs of the lowest layer may have no gradient, so no hook tells that it is over.
            Variable._execution_engine.queue_callback(self._finish)
            self._at = len(self._groups)
        self._descend(number)

    def _descend(self, number: int) -> None:
        """Gather the layers down to `number`; those above it run no backward on this rank."""
        assert self._at is not None
        for one in range(self._at - 1, number - 1, -1):
            self._turn_to(one, one - 1 if one > self._lowest else None)
        self._at = number

    def _finish(self) -> None:
        """Gather the layers that other ranks may have reached, and keep the shards."""
        self._descend(min(self._lowest, len(self._groups) if self._at is None else self._at))
        self._turn_to(None, None)
        self._at = None

    def _turn_to(self, number: int | None, ahead: int | None) -> None:
        """Make `number` the only layer that is there, and start to gather `ahead`."""
        for one in sorted(self._here - {number}):
            self._drop(one)
        if number is not None:
            self._gather(number)
        if ahead is not None and 0 <= ahead < len(self._groups):
            self._start(ahead)

    # A signal may raise anywhere below, and `complete` goes on from there: each call of FSDP can be
    # repeated, so what is recorded follows it.

    def _start(self, number: int) -> None:
        if number in self._here or number in self._coming:
            return
        group = self._groups[number]
        handle = _NOTHING if group is None else group.unshard(async_op=True)
        assert handle is not None
        self._coming[number] = handle
        self._started += 1

    def _gather(self, number: int) -> None:
        self._start(number)
        if (handle := self._coming.get(number)) is not None:
            handle.wait()
            self._here.add(number)
            del self._coming[number]

    def _drop(self, number: int) -> None:
        if number in self._here:
            if (group := self._groups[number]) is not None:
                group.reshard()
            self._here.discard(number)


class _Nothing:
    """The gather of a layer without sharded weights."""

    def wait(self) -> None:
        """Return at once."""


_NOTHING = _Nothing()
