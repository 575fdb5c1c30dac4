"""Keeps inputs of layers in host memory until backward; `planning.planner` decides whether.

This file decides where the input waits and when it is copied. Pinned memory is allocated once and
kept (`PinnedPool`): the driver takes ten milliseconds to pin as much as one layer's input. All
copies of a device run on one stream beside the compute stream, in the order in which they were
started; so a block may be reused for the next layer as soon as the copy back was started.

Which inputs are offloaded is decided in `recompute`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


@dataclass(slots=True)
class PinnedPool:
    """Blocks of pinned host memory that are reused.

    Sizes are powers of two, as those of torch's pinned blocks: packs of similar size share blocks,
    and no part of a block is lost.

    Attributes:
        make: allocates a block of so many bytes.
        least: bytes that the largest pack offloads per layer. Smaller packs get blocks of this size
            too: torch never frees a pinned block, so growing blocks would be held beside the
            smaller ones.
        nbytes: bytes of all blocks that were allocated.
    """

    make: Callable[[int], Tensor] = _pinned
    least: int = 1
    nbytes: int = 0
    _free: list[Tensor] = field(default_factory=list)
    # An input that was not fetched returns its block when it is collected, in any thread.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def take(self, nbytes: int) -> Tensor:
        """The smallest free block of at least `nbytes` bytes; else a new one."""
        with self._lock:
            enough = [block for block in self._free if len(block) >= nbytes]
            if enough:
                return self._out(min(enough, key=len))
            size = 1 << (max(nbytes, self.least) - 1).bit_length()
            block = self.make(size)
            self.nbytes += size
            return block

    def give_back(self, block: Tensor) -> None:
        """Make `block` free for reuse; a copy from or into it may still be in progress."""
        with self._lock:
            self._free.append(block)

    def _out(self, block: Tensor) -> Tensor:
        self._free = [free for free in self._free if free is not block]
        return block


class LayerInput:
    """A layer's input, on its device."""

    def __init__(self, x: Tensor) -> None:
        self._x: Tensor | None = x.detach()

    def take(self) -> Tensor:
        """Return the input and drop the reference to it; at most once."""
        assert self._x is not None, "a layer's backward ran twice"
        x, self._x = self._x, None
        return x


class OffloadedInput(LayerInput):
    """A layer's input in pinned host memory, copied back while the layer above is recomputed.

    Args:
        x: on a CUDA device.
        before: the input of the layer below, whose copy back starts when this input is taken.
    """

    _streams: dict[torch.device, torch.cuda.Stream] = {}  # noqa: RUF012  one for each device
    _pools: dict[torch.device, PinnedPool] = {}  # noqa: RUF012  and its blocks: copies are in its order

    def __init__(self, x: Tensor, before: OffloadedInput | None) -> None:
        self._block: Tensor | None = None
        super().__init__(x)
        self._before = before
        self._device = x.device
        self._side = self._stream(x.device)
        self._pool = self.pool(x.device)
        self._block = self._pool.take(x.nbytes)
        self._away = self._block[: x.nbytes].view(x.dtype).view(x.shape)
        self._side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._side):
            self._away.copy_(x.detach(), non_blocking=True)
        x.record_stream(self._side)
        self._x = None

    @classmethod
    def pool(cls, device: torch.device) -> PinnedPool:
        """The pinned blocks for inputs of `device`."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return cls._pools.setdefault(device, PinnedPool())

    @classmethod
    def _stream(cls, device: torch.device) -> torch.cuda.Stream:
        if device not in cls._streams:
            cls._streams[device] = torch.cuda.Stream(device)
        return cls._streams[device]

    def fetch(self) -> None:
        """Start the copy back."""
        with torch.cuda.stream(self._side):
            self._x = self._away.to(self._device, non_blocking=True)
        self._release()

    def take(self) -> Tensor:
        if self._x is None and self._block is not None:
            self.fetch()
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._side)
        x = super().take()
        x.record_stream(here)
        if self._before is not None:
            self._before.fetch()
        return x

    def _release(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            self._pool.give_back(block)

    def __del__(self) -> None:
        self._release()  # the graph was freed without a backward
