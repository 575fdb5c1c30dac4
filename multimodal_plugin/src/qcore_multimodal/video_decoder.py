"""`Decoder`: frames of videos, decoded in a bounded process of their own.

This file decides how long opening and decoding may take, and how the end of the process becomes the
error of a row: FFmpeg is a large decoder of files from anywhere, so a file that makes it loop,
crash or take all memory must cost one row and not the run. A process serves all videos of a thread;
after it was ended, the next video starts another one. `video_worker` is the process,
`videos` selects and resizes the frames.

- ``QC-VISION-035`` the decoder crashed.
- ``QC-VISION-039`` the file needs more memory than a video may.
- ``QC-VISION-046`` the file takes longer than a video may.
"""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from qcore.api import RowError

from .video_frames import Bounds, damaged

if TYPE_CHECKING:
    from .processor import Bytes

# Not `Final`: tests lower these limits.
BOUNDS = Bounds()
SECONDS = 60.0  #: to open or decode any video
BYTES_PER_SECOND = 4e6  #: that opening reads at least, beyond `SECONDS`
PIXELS_PER_SECOND = 1e7  #: that decoding yields at least, beyond `SECONDS`
PROCESSES: Final = 4  #: at once; each may take the memory that a video may
_START_SECONDS: Final = 60.0  # until the process is up
_WORKER: Final = Path(__file__).with_name("video_worker.py")
_KEPT: Final = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # of the environment
#: Each thread's arena would reserve address space, which is limited.
_ENVIRONMENT: Final = {"MALLOC_ARENA_MAX": "2", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Decoder:
    """Decodes videos in processes that are started on first use, one for each thread at most."""

    def __init__(self) -> None:
        self._idle: list[_Process] = []
        self._turns = threading.BoundedSemaphore(PROCESSES)

    @contextmanager
    def open(self, file: BinaryIO) -> Iterator[Video]:
        """Open a video.

        Raises:
            RowError: ``QC-VISION-028``, ``-030``, ``-031``, ``-033`` to ``-036``, ``-039``,
                ``-046``.
        """
        with self._turns, _descriptor(file) as descriptor:
            process = self._started()
            try:
                seconds = SECONDS + os.fstat(descriptor).st_size / BYTES_PER_SECOND
                process.send({"bounds": asdict(BOUNDS), "seconds": seconds}, seconds, descriptor)
                video = Video(process, process.answer())
                try:
                    yield video
                except BaseException:
                    process.close()  # frames may be left in the socket
                    raise
                process.send({}, SECONDS)
            finally:
                self._idle.append(process)

    def _started(self) -> _Process:
        """A process that decodes nothing; those that have ended are dropped."""
        while self._idle:
            if (process := self._idle.pop()).usable:
                return process
        process = _Process()
        weakref.finalize(self, process.close)
        return process


class Video:
    """An open video (`qcore_multimodal.video_frames.FrameSource`, in the other process).

    Attributes:
        count: number of frames.
        pixels: of one frame.
        rate: mean frames per second.
    """

    def __init__(self, process: _Process, about: dict[str, Any]) -> None:
        self._process = process
        self.pixels: int = math.prod(about["size"])
        self.count: int = about["count"]
        self.rate: float = about["rate"]

    def frames(self, indices: Sequence[int]) -> Iterator[Bytes]:
        """The pixels ``[H, W, 3]`` of the selected frames in order.

        Sets `count` to the number of all frames after the last one.

        Raises:
            RowError: as `Decoder.open`.
        """
        seconds = SECONDS + self.count * self.pixels / PIXELS_PER_SECOND
        self._process.send({"indices": list(indices), "seconds": seconds}, seconds)
        while "count" not in (answer := self._process.answer()):
            yield self._process.pixels(answer["height"], answer["width"])
        self.count = answer["count"]


class _Process:
    """One process of `video_worker` and the socket to it."""

    def __init__(self) -> None:
        self._dead = False
        self._owner = os.getpid()
        self._seconds = _START_SECONDS
        self._deadline = time.monotonic() + self._seconds
        self._channel, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER)],
                stdin=other.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={**_ENVIRONMENT, **{n: os.environ[n] for n in _KEPT if n in os.environ}},
            )
        self.answer()

    @property
    def usable(self) -> bool:
        """Whether it runs and was started by this process, and not by one that forked since."""
        return not self._dead and self._owner == os.getpid()

    def send(self, request: dict[str, Any], seconds: float, descriptor: int | None = None) -> None:
        """Send a request; its answers must arrive within `seconds`."""
        self._seconds, self._deadline = seconds, time.monotonic() + seconds
        body = json.dumps(request).encode("ascii")
        message = [len(body).to_bytes(8, "little") + body]
        try:
            if descriptor is None:
                self._channel.sendall(message[0])
            else:
                sent = socket.send_fds(self._channel, message, [descriptor])
                self._channel.sendall(message[0][sent:])
        except OSError:
            raise self._lost() from None

    def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            RowError: the one that the process sent, or the end of the process.
        """
        size = int.from_bytes(self._read(8), "little")
        answer: dict[str, Any] = json.loads(bytes(self._read(size)))
        if "memory" in answer:
            raise RowError(
                "QC-VISION-039",
                "has too many video frames or audio samples: decoding needs too much memory",
                expected="a video that decodes in 4 GiB",
                fix="cut it into shorter videos, or encode it again",
            )
        if "error" in answer:
            error = answer["error"]
            raise RowError(error.pop("code"), error.pop("what"), **error)
        return answer

    def pixels(self, height: int, width: int) -> Bytes:
        """One frame ``[height, width, 3]``."""
        return np.frombuffer(self._read(height * width * 3), np.uint8).reshape(height, width, 3)

    def close(self) -> None:
        """End the process, unless this is a fork of the process that started it."""
        self._dead = True
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._channel.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            self._channel.settimeout(max(1e-3, self._deadline - time.monotonic()))
            try:
                count = self._channel.recv_into(view[at:])
            except TimeoutError:
                self.close()
                raise RowError(
                    "QC-VISION-046",
                    "takes too long to decode",
                    found=f"more than {self._seconds:.0f} s",
                    expected="a video that decodes at a usual speed",
                    fix="encode the video again",
                ) from None
            except OSError:
                raise self._lost() from None
            if not count:
                raise self._lost()
            at += count
        return data

    def _lost(self) -> RowError:
        """The error for a process that ended by itself, as a crash of FFmpeg ends it."""
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            status = 0
        self.close()
        return damaged(f"its decoder ended with status {status}")


@contextmanager
def _descriptor(file: BinaryIO) -> Iterator[int]:
    """A descriptor of the same bytes, at their start."""
    try:
        descriptor = file.fileno()
    except io.UnsupportedOperation:  # bytes of a row
        with tempfile.TemporaryFile() as copy:
            file.seek(0)
            copy.write(file.read())
            copy.flush()
            copy.seek(0)
            yield copy.fileno()
    else:
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
