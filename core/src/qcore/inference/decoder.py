"""Computes next-token logits: prefill, then steps over caches, replayed as a CUDA graph on a GPU.

This file decides how a token is computed. On a GPU the host would need longer to launch the kernels
of a token than the GPU to run them, so they are captured once in a CUDA graph and replayed: the
token, its position and the logits are in static tensors, and caches are written at the position
(`DecodeCache.hold`). Attention reads a span of the cache, a power of two. A token that no longer
fits in the span is computed without the graph, which is then captured for the next span.

``plain``     any cache, which grows with the document
``held``      the step of the graph, run without capturing it
``captured``  the graph, replayed

All three compute the same. Which token follows is decided in `sampling`.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api.blocks import DecodeCache, Media, Packed
from ..nn.kernels.registry import REFERENCE, Chosen, State
from ..nn.model import Model

#: Tokens of the first span.
FIRST = 256


class Way(str, Enum):
    """How a token is computed."""

    PLAIN = "plain"
    HELD = "held"
    CAPTURED = "captured"


def way_of(kernels: Chosen) -> tuple[Way, str]:
    """How tokens are computed with these kernels, and on a GPU why they are not captured."""
    if kernels.device != "cuda":
        return Way.PLAIN, ""
    for line in kernels.table:
        if line.state is State.CHOSEN and line.waits:
            by = "its reference" if line.backend == REFERENCE else line.backend
            return Way.PLAIN, f"{line.op} is computed by {by}, which waits for the device"
    return Way.CAPTURED, ""


class Decoder:
    """Computes logits of one document after another; caches and graphs are reused.

    Args:
        model: on the device, with its adapters.
        device: of the model.
        way: how a token is computed; ``plain`` if a layer's cache is not a `DecodeCache`.

    Attributes:
        done: tokens of the document that the caches hold.
        captures: graphs captured so far.
    """

    def __init__(self, model: Model, device: torch.device, way: Way) -> None:
        self.model, self.device, self.way = model, device, way
        self.done = self.captures = 0
        self._ahead = 0  # of positions, of the number of tokens: a medium takes fewer of them
        self._room = self._span = 0
        self._caches: list[DecodeCache] = []
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._captured_of: tuple[list[object], list[int]] = ([], [])

    @torch.inference_mode()
    def start(
        self, ids: Tensor, room: int, positions: Tensor | None = None, media: Media | None = None
    ) -> Tensor:
        """Begin a document.

        Args:
            ids: ``[T]`` int64, its first tokens, at least one.
            room: tokens that it will have at most.
            positions: ``[axes, T]`` of its tokens; by default they are numbered. Later tokens
                have the positions that follow the largest, on every axis.
            media: what a tower reads of it.

        Returns:
            Logits ``[V]`` float32 after the last of them.
        """
        self._make_room(room)
        if self._graphs and not self._unchanged():
            self._forget()
        self._span, self.done, self._ahead = 0, len(ids), 0
        if positions is None:
            positions = torch.arange(len(ids), device=self.device)
        else:
            self._ahead = int(positions.max()) + 1 - len(ids)
        return self._logits(ids, positions, media)

    @torch.inference_mode()
    def next(self, token: Tensor) -> Tensor:
        """Logits ``[V]`` float32 after another token ``[1]``; valid until the next call.

        Raises:
            ValueError: when the document outgrows its room.
        """
        if self.done + 1 > self._room:
            raise ValueError(f"room for {self._room} tokens cannot hold {self.done + 1}")
        self.done += 1
        if self.way is Way.PLAIN:
            at = self.done - 1 + self._ahead
            return self._logits(token, torch.arange(at, at + 1, device=self.device))
        if self.done > self._span:
            self._hold()
        self._token.copy_(token)
        if self._span in self._graphs:
            self._graphs[self._span].replay()
        else:
            self._step()  # also makes ready what may not be made while capturing
            if self.way is Way.CAPTURED:
                self._capture()
        return self._out

    def _make_room(self, room: int) -> None:
        """Caches without a document; those of before where they are large enough."""
        if self.way is not Way.PLAIN and self._caches and room <= self._room:
            for cache in self._caches:
                cache.reset()
            return
        self._forget()  # graphs hold the caches of before
        self._caches, self._room = [], room
        if self.way is not Way.PLAIN:
            self._room = span_of(room)
        layers = self.model.trunk.layers
        for layer in layers:
            with self.model.guard(layer):
                self._caches.append(layer.new_cache(self._room, self.device))
        if not all(isinstance(cache, DecodeCache) for cache in self._caches):
            self.way = Way.PLAIN
        if self.way is not Way.PLAIN:
            fresh = torch.zeros(3, 1, dtype=torch.int64, device=self.device)
            self._token, self._at, self._shift = fresh
            self._out = torch.zeros(len(self.model.head), device=self.device)

    def _hold(self) -> None:
        """Let caches be read to the span that the next token needs."""
        if not self._span:
            self._at.fill_(self.done - 1)
            self._shift.fill_(self._ahead)
        self._span = span_of(self.done)
        for cache in self._caches:
            cache.hold(self._at, self._span)

    def _step(self) -> None:
        """One token, from tensors that stay to tensors that stay."""
        self._out.copy_(self._logits(self._token, self._at + self._shift))
        self._at.add_(1)

    def _capture(self) -> None:
        """Record a step, which computes nothing."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if not self._graphs:
            self._captured_of = self._holds()
        graph = torch.cuda.CUDAGraph()
        # Another thread, a progress bar's or a logger's, does not disturb it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step()
        self._graphs[self._span] = graph
        self.captures += 1

    def _forget(self) -> None:
        """Drop all graphs, and with them their memory, which no later one may share."""
        self._graphs.clear()
        self._pool = None

    def _logits(self, ids: Tensor, positions: Tensor, media: Media | None = None) -> Tensor:
        batch = Packed(ids=ids, cu_seqlens=(0, len(ids)), positions=positions, media=media)
        x = self.model.embed(batch)
        for layer, cache in zip(self.model.trunk.layers, self._caches, strict=True):
            with self.model.guard(layer):
                x = layer(x, batch, cache)
        last = self.model.trunk.final(x[-1:])
        return F.linear(last, self.model.head)[0].float()

    def _holds(self) -> tuple[list[object], list[int]]:
        """What a graph reads the addresses of, and in which state: once a document."""
        things: list[object] = []
        state: list[int] = []
        for parameter in self.model.parameters():
            things.append(parameter)
            state += [parameter.data_ptr(), parameter._version]
        for module in self.model.lora_layers.values():
            things += [module.lora, getattr(module, "nf4", None)]
        return things, state

    def _unchanged(self) -> bool:
        """Whether weights and adapters are those that were captured."""
        (then, before), (now, state) = self._captured_of, self._holds()
        alike = len(then) == len(now) and all(a is b for a, b in zip(then, now, strict=True))
        return alike and before == state


def span_of(tokens: int) -> int:
    """The smallest span that holds so many tokens."""
    return max(FIRST, 1 << (tokens - 1).bit_length())
