"""Frames of video files with PyAV and of animated images with Pillow, in the decoder's process.

This file decides which videos are refused, and how many frames a video has: the decoded frames, not
the number in a header. Only the selected frames are converted to pixels. A frame's time is its
index divided by the mean frame rate, as in transformers, even if the rate varies. The rotation of
phone videos is applied. `containers` decides which containers are opened; `video_worker` runs this
file in a process whose time and memory are bounded. It imports no torch.

- ``QC-VISION-030`` too many pixels in all frames together.
- ``QC-VISION-033`` PyAV is not installed.
- ``QC-VISION-035`` a damaged file.
- ``QC-VISION-036`` a file without a video stream.
- ``QC-VISION-039`` too many frames or samples, or an unknown frame rate.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from qcore.api import RowError

from . import images
from .containers import demuxer

_SHORTEN: Final = "cut it into shorter videos"
_DEFAULT_DURATION: Final = 0.1  # seconds of a frame without a duration, as in browsers
_MAX_THREADS: Final = 8  # each thread holds frames of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Limits of what is decoded.

    Attributes:
        animated_bytes: bytes of an animated image, which is read into memory.
        animated_frames: frames of an animated image, which are decoded one by one.
        animated_pixels: pixels of an animated image: about a second per hundred million.
        video_frames: of a video file: two days at 60 frames per second.
        video_pixels: pixels of a video file: two hours of 4K at 60 frames per second.
    """

    animated_bytes: int = images.MAX_BYTES
    animated_frames: int = 20_000
    animated_pixels: int = 1 << 30
    video_frames: int = 10_000_000
    video_pixels: int = 1 << 42


class FrameSource(Protocol):
    """An open video.

    Attributes:
        count: number of frames.
        rate: mean frames per second.
        size: width and height.
    """

    count: int
    rate: float
    size: tuple[int, int]

    def frames(self, selected: frozenset[int]) -> Iterator[NDArray[np.uint8] | None]:
        """All frames ``[H, W, 3]`` in order; ``None`` for each frame that is not selected."""
        ...


@contextmanager
def opened(file: BinaryIO, bounds: Bounds) -> Iterator[FrameSource]:
    """Open a video file or an animated image; decoder errors in the context become `RowError`.

    Raises:
        RowError: ``QC-VISION-028``, ``-030``, ``-031``, ``-033`` to ``-036``, ``-039``.
        MemoryError: the process may not have more memory.
    """
    name = demuxer(file)
    if name is None:
        data = images.read_bounded(file, bounds.animated_bytes)
        with images.open_image(data) as image:
            images.verify_checksums(image, data)
            yield AnimatedImage(image, bounds)
    else:
        with _decoding():
            yield VideoFile(file, name, bounds)


def _check_frames(count: int, size: tuple[int, int], most: int, pixels: int, fix: str) -> None:
    """Refuse too many frames or pixels (``QC-VISION-030``, ``-039``)."""
    if count > most:
        raise RowError(
            "QC-VISION-039", "has too many frames", found=count, expected=f"at most {most}", fix=fix
        )
    if count * size[0] * size[1] > pixels:
        raise _too_many_pixels(f"{count} frames of {size[0]} x {size[1]}", pixels, fix)


def _too_many_pixels(decoded: str, most: int, fix: str) -> RowError:
    return RowError(
        "QC-VISION-030",
        "has too many pixels in all frames together",
        found=decoded,
        expected=f"at most {most} pixels",
        fix=fix,
    )


class AnimatedImage:
    """An animated image, opened by Pillow."""

    def __init__(self, image: Any, bounds: Bounds) -> None:
        self._image = image
        self.count = int(getattr(image, "n_frames", 1))
        self.size: tuple[int, int] = (image.width, image.height)
        fix = "convert it to MP4"
        _check_frames(
            self.count, self.size, bounds.animated_frames, bounds.animated_pixels, fix
        )  # fmt: skip
        total = 0.0
        for number in range(self.count):
            image.seek(number)
            image.load()  # a WebP frame has its duration only after loading
            duration = image.info.get("duration", 0)
            valid = isinstance(duration, int | float) and math.isfinite(duration) and duration > 0
            total += duration / 1000 if valid else _DEFAULT_DURATION
        self.rate = self.count / total

    def frames(self, selected: frozenset[int]) -> Iterator[NDArray[np.uint8] | None]:
        for number in range(self.count):
            if number in selected:
                self._image.seek(number)
                yield images.to_rgb(self._image)
            else:
                yield None


class VideoFile:
    """A video file, decoded by PyAV; each pass reopens it."""

    def __init__(self, file: BinaryIO, name: str, bounds: Bounds) -> None:
        self._file, self._name, self._bounds = file, name, bounds
        self.size = (0, 0)
        self.count, self.rate = self._scan()

    def _scan(self) -> tuple[int, float]:
        """Number of packets, which usually equals the number of frames, and the mean frame rate."""
        bounds = self._bounds
        count, first, last = 0, math.inf, -math.inf
        with self._open() as (container, stream):
            self.size = size = stream.codec_context.width, stream.codec_context.height
            images.check_size(*size)
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    count += 1
                    _check_frames(count, size, bounds.video_frames, bounds.video_pixels, _SHORTEN)
                    if packet.pts is not None:
                        first, last = min(first, packet.pts), max(last, packet.pts)
            listed = int(stream.frames or 0)
            stated = float(stream.average_rate or 0)
            span = (last - first) * float(stream.time_base or 0) if last >= first else 0.0
        if not count and listed:  # FFmpeg gives up an index that it cannot build
            raise damaged(f"none of {listed} frames is readable")
        measured = (count - 1) / span if count > 1 and span > 0 else 0.0
        if not measured or (stated and abs(count / stated - count / measured) * stated <= 1.5):
            measured = stated or measured
        if count and not 0 < measured < 10_000:
            raise RowError(
                "QC-VISION-039", "has no valid frame rate",
                fix="encode the video again",
            )  # fmt: skip
        return count, measured

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        import av
        from av.stream import Disposition

        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        with av.open(self._file, format=self._name, metadata_errors="ignore") as container:
            for stream in container.streams:
                if stream.frames > size:
                    raise too_many(f"{stream.frames} samples in {size} bytes")
            # Cover art is a video stream with a single image.
            streams = [s for s in container.streams.video
                     if not s.disposition & Disposition.attached_pic]  # fmt: skip
            if not streams:
                others = sorted({stream.type for stream in container.streams})
                raise RowError(
                    "QC-VISION-036", "has no video stream", found=", ".join(others) or "no streams",
                    expected="a video stream",
                )  # fmt: skip
            stream = streams[0]
            if stream.codec_context is None:
                raise RowError(
                    "QC-VISION-035", "uses a codec that the installed PyAV cannot decode"
                )
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = min(os.cpu_count() or 1, _MAX_THREADS)
            stream.codec_context.options = {"max_pixels": str(images.MAX_PIXELS)}
            yield container, stream

    def frames(self, selected: frozenset[int]) -> Iterator[NDArray[np.uint8] | None]:
        decoded, most = 0, self._bounds.video_pixels
        with self._open() as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                # A packet may have several frames, and a frame may differ from the declared size.
                decoded += frame.width * frame.height
                if decoded > most:
                    raise _too_many_pixels(f"{decoded} in {number + 1} frames", most, _SHORTEN)
                if frame.is_corrupt:
                    raise damaged(f"frame {number} is incomplete")
                if number not in selected:
                    yield None
                    continue
                images.check_size(frame.width, frame.height)
                pixels = frame.to_ndarray(format="rgb24")
                # PyAV's rotation is counterclockwise, as in numpy.
                yield np.rot90(pixels, round(frame.rotation / 90) % 4)


@contextmanager
def _decoding() -> Iterator[None]:
    """Convert exceptions of PyAV to `RowError`."""
    try:
        import av
    except ImportError as error:
        raise RowError(
            "QC-VISION-033",
            "cannot be decoded: PyAV is not installed",
            found=str(error),
            fix='pip install "qcore-multimodal[video]"',
        ) from None
    # FFmpegError covers FFmpeg's error codes; PyAV's own conversions raise the others.
    decoder_errors = (
        av.error.FFmpegError, OSError, ValueError, TypeError, LookupError, EOFError,
        OverflowError, RuntimeError, NotImplementedError, ZeroDivisionError,
    )  # fmt: skip
    try:
        yield
    except MemoryError:
        raise
    except decoder_errors as error:
        raise damaged(getattr(error, "strerror", None) or str(error)) from None


def too_many(found: str) -> RowError:
    """The error for more frames or audio samples than can be decoded."""
    return RowError(
        "QC-VISION-039",
        "has too many video frames or audio samples",
        found=found,
        expected="as many as the file can hold",
        fix=_SHORTEN,
    )


def damaged(reason: str) -> RowError:
    """The error for a file that does not decode."""
    return RowError(
        "QC-VISION-035",
        "is damaged",
        found=reason[:200],
        expected="a video that decodes to its end",
        fix="encode the video again",
    )
