"""The process that decodes videos; run by its path, imports no torch and no transformers.

This file decides what decoding may use: memory and files are limited by the kernel, and an alarm
ends the process if its parent does not. Opening a file may take less memory than decoding its
frames, because the tables of a few bytes can make FFmpeg build an index of any size.
`qcore_multimodal.video_decoder` starts the process and ends it when it is late.

Messages over the socket that is standard input: eight bytes of length, little endian, then JSON.
``{"ready": true}`` comes first. ``{"bounds": ..., "seconds": ...}`` with a file descriptor opens a
video, answered by ``{"count": ..., "rate": ..., "size": [width, height]}``. ``{"indices": [..],
"seconds": ...}`` decodes it: ``{"height": ..., "width": ...}`` and the bytes of each selected
frame, then ``{"count": ...}``. Any answer may be ``{"error": {...}}``, a `RowError`, or
``{"memory": true}``.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np

from qcore.api import RowError
from qcore_multimodal.video_frames import Bounds, FrameSource, opened

OPENING: Final = 1 << 30  #: bytes of address space while a file is opened
DECODING: Final = 4 << 30  #: bytes of address space while frames are decoded
_HEAD: Final = 8
_GRACE: Final = 10  # seconds that the parent has to end this process first


def main(channel: socket.socket) -> None:
    """Answer requests until the socket ends."""
    _limit()
    _send(channel, {"ready": True})
    while True:
        received = _receive(channel)
        if received is None:
            return
        request, descriptor = received
        if descriptor is not None:
            _serve(channel, request, descriptor)


def _serve(channel: socket.socket, request: dict[str, Any], descriptor: int) -> None:
    """Open one video, and decode it until the parent has what it wants."""
    with _answering(channel), os.fdopen(descriptor, "rb") as file, ExitStack() as stack:
        _bound(OPENING, request["seconds"])
        video = stack.enter_context(opened(file, Bounds(**request["bounds"])))
        _send(channel, {"count": video.count, "rate": video.rate, "size": video.size})
        while (received := _receive(channel)) is not None and "indices" in received[0]:
            _bound(DECODING, received[0]["seconds"])
            _send(channel, {"count": _stream(channel, video, received[0]["indices"])})
    signal.alarm(0)


def _stream(channel: socket.socket, video: FrameSource, indices: list[int]) -> int:
    """Send the selected frames; returns the number of all frames."""
    count = 0
    for frame in video.frames(frozenset(indices)):
        if frame is not None:
            height, width, _ = frame.shape
            _send(channel, {"height": height, "width": width})
            channel.sendall(np.ascontiguousarray(frame).data)
        count += 1
    return count


@contextmanager
def _answering(channel: socket.socket) -> Iterator[None]:
    """Send the parent what goes wrong inside the context."""
    try:
        yield
    except MemoryError:
        _bound(DECODING, _GRACE)
        _send(channel, {"memory": True})
    except RowError as bad:
        _bound(DECODING, _GRACE)
        named = {name: getattr(bad, name) for name in ("code", "what", "at", "fix")}
        texts = {name: _text(getattr(bad, name)) for name in ("found", "expected")}
        _send(channel, {"error": {**named, **texts}})


def _text(value: object) -> object:
    return value if value is None or isinstance(value, int | float) else str(value)


def _limit() -> None:
    """Give up what decoding never needs: files, core dumps, Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    for what, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        _set(what, value, value)


def _bound(memory: int, seconds: float) -> None:
    """Limit memory from now on, and time until the next call."""
    _set(resource.RLIMIT_AS, memory, resource.RLIM_INFINITY)
    signal.alarm(math.ceil(seconds) + _GRACE)


def _set(what: int, soft: int, hard: int) -> None:
    most = resource.getrlimit(what)[1]
    if most != resource.RLIM_INFINITY:  # a limit of the user's own is not raised
        soft, hard = min(soft, most), most
    try:
        resource.setrlimit(what, (soft, hard))
    except (ValueError, OSError):  # macOS has RLIMIT_AS and refuses to set it
        return


def _receive(channel: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    """A request and its file descriptor; ``None`` when the parent has gone."""
    head, descriptors, _, _ = socket.recv_fds(channel, _HEAD, 1)
    rest = _exactly(channel, _HEAD - len(head)) if head else None
    if rest is None:
        return None
    body = _exactly(channel, int.from_bytes(head + rest, "little"))
    if body is None:
        return None
    request: dict[str, Any] = json.loads(body)
    return request, descriptors[0] if descriptors else None


def _exactly(channel: socket.socket, size: int) -> bytes | None:
    """The next `size` bytes; ``None`` if the socket ends before them."""
    received = bytearray()
    while len(received) < size:
        piece = channel.recv(size - len(received))
        if not piece:
            return None
        received += piece
    return bytes(received)


def _send(channel: socket.socket, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode("ascii")
    channel.sendall(len(body).to_bytes(_HEAD, "little") + body)


if __name__ == "__main__":
    with socket.socket(fileno=0) as parent:
        main(parent)
