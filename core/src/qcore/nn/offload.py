"""A layer's input that waits in the host's memory between forward and backward.

This file decides where it waits and when it goes and comes back. Pinned memory is asked for
once and kept (`Lot`): the driver takes ten milliseconds for what a layer parks. All copies of a
device run on one stream beside the one that computes, in the order in which they were started;
so a place may be given to the next layer as soon as the way back of the last was started.

Who parks, and when, is `again`'s decision.
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
class Lot:
    """Places in the host's memory, given out and taken back.

    Places are powers of two, as torch's pinned blocks are: packs of like size share them, and none
    of a block is lost.

    Attributes:
        make: gives a place of so many bytes.
        least: bytes of what the largest pack parks. Smaller packs get places as large: torch keeps
            a pinned block for good, so places that grow would be held beside those they outgrew.
        nbytes: of all places that were made.
    """

    make: Callable[[int], Tensor] = _pinned
    least: int = 1
    nbytes: int = 0
    _free: list[Tensor] = field(default_factory=list)
    # What was not fetched comes back when it is collected: in whatever thread that happens.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def take(self, nbytes: int) -> Tensor:
        """The smallest free place of at least `nbytes` bytes; else a new one."""
        with self._lock:
            enough = [place for place in self._free if len(place) >= nbytes]
            if enough:
                return self._out(min(enough, key=len))
            size = 1 << (max(nbytes, self.least) - 1).bit_length()
            place = self.make(size)
            self.nbytes += size
            return place

    def give_back(self, place: Tensor) -> None:
        """Take `place` back; what is copied from it or into it may still be under way."""
        with self._lock:
            self._free.append(place)

    def _out(self, place: Tensor) -> Tensor:
        self._free = [one for one in self._free if one is not place]
        return place


class Held:
    """A layer's input, where it is."""

    def __init__(self, x: Tensor) -> None:
        self._x: Tensor | None = x.detach()

    def take(self) -> Tensor:
        """The input, given up."""
        assert self._x is not None, "a layer's backward ran twice"
        x, self._x = self._x, None
        return x


class Parked(Held):
    """A layer's input in pinned memory, on its way back while the layer above runs again.

    Args:
        x: on a CUDA device.
        before: the input of the layer below, fetched when this one is taken.
    """

    _streams: dict[torch.device, torch.cuda.Stream] = {}  # noqa: RUF012  one for each device
    _lots: dict[torch.device, Lot] = {}  # noqa: RUF012  and its places: copies share its order

    def __init__(self, x: Tensor, before: Parked | None) -> None:
        self._place: Tensor | None = None
        super().__init__(x)
        self._before = before
        self._device = x.device
        self._side = self._stream(x.device)
        self._lot = self.lot(x.device)
        self._place = self._lot.take(x.nbytes)
        self._away = self._place[: x.nbytes].view(x.dtype).view(x.shape)
        self._side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._side):
            self._away.copy_(x.detach(), non_blocking=True)
        x.record_stream(self._side)
        self._x = None

    @classmethod
    def lot(cls, device: torch.device) -> Lot:
        """The places of what `device` parks."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return cls._lots.setdefault(device, Lot())

    @classmethod
    def _stream(cls, device: torch.device) -> torch.cuda.Stream:
        if device not in cls._streams:
            cls._streams[device] = torch.cuda.Stream(device)
        return cls._streams[device]

    def fetch(self) -> None:
        """Start the way back."""
        with torch.cuda.stream(self._side):
            self._x = self._away.to(self._device, non_blocking=True)
        self._leave()

    def take(self) -> Tensor:
        if self._x is None and self._place is not None:
            self.fetch()
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._side)
        x = super().take()
        x.record_stream(here)
        if self._before is not None:
            self._before.fetch()
        return x

    def _leave(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            self._lot.give_back(place)

    def __del__(self) -> None:
        self._leave()  # a graph that was let go without a backward
