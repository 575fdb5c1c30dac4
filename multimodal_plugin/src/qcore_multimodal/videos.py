"""Video decoding: frames of video files with PyAV, and of animated images with Pillow.

This file decides which videos are refused, and how many frames a video has: the decoded frames, not
the number in a header. Only the frames that the processor samples are kept, and each is resized
when it is decoded. A frame's time is its index divided by the mean frame rate, as in transformers,
even if the rate varies. The rotation of phone videos is applied. `containers` decides which
containers are opened.

- ``QC-VISION-030`` too many pixels in all frames together.
- ``QC-VISION-033`` PyAV is not installed.
- ``QC-VISION-035`` a damaged file.
- ``QC-VISION-036`` a file without a video stream.
- ``QC-VISION-037`` too few frames.
- ``QC-VISION-038`` frames of different sizes.
- ``QC-VISION-039`` too many frames, or an unknown frame rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcore.api import RowError

from . import images
from .containers import demuxer
from .media_options import Limits

if TYPE_CHECKING:
    from .processor import Bytes, Grid, VideoProcessor

# Not `Final`: tests lower these limits.
MAX_ANIMATED_FRAMES = 20_000  #: frames of an animated image, which are decoded one by one
MAX_ANIMATED_PIXELS = 1 << 30  #: pixels of an animated image: about a second per hundred million
MAX_VIDEO_FRAMES = 10_000_000  #: of a video file: two days at 60 frames per second
MAX_VIDEO_PIXELS = 1 << 42  #: pixels of a video file: two hours of 4K at 60 frames per second
_SHORTEN: Final = "cut it into shorter videos"
_DEFAULT_DURATION: Final = 0.1  # seconds of a frame without a duration, as in browsers


class _FrameCountChanged(Exception):
    """The number of decoded frames differs from the number counted without decoding."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class _FrameSource(Protocol):
    """An open video.

    Attributes:
        count: number of frames.
        rate: mean frames per second.
    """

    count: int
    rate: float

    def frames(self) -> Iterator[NDArray[np.uint8] | None]:
        """All frames ``[H, W, 3]`` in order; ``None`` for each frame that is not selected."""
        ...

    def select(self, indices: Sequence[int]) -> None:
        """Select the frames that `frames` yields as pixels."""
        ...


def process(
    file: BinaryIO, processor: VideoProcessor, limits: Limits
) -> tuple[Grid, tuple[float, ...], Bytes]:
    """Decode, sample and resize a video, and split it into patches.

    Args:
        file: the video file.
        processor: the video processor.
        limits: processing limits of the content part.

    Returns:
        Grid, timestamps of the temporal patches in seconds, and values ``[U, F]``.

    Raises:
        RowError: ``QC-VISION-030``, ``-031``, ``-033`` to ``-039``.
    """
    name = demuxer(file)
    if name is None:
        data = images.read_bounded(file)
        with images.open_image(data) as image:
            images.verify_checksums(image, data)
            return _process(_AnimatedImage(image), processor, limits)
    with _decoding():
        return _process(_VideoFile(file, name), processor, limits)


def process_frames(
    frames: Iterable[Bytes], count: int, processor: VideoProcessor, limits: Limits
) -> tuple[Grid, tuple[float, ...], Bytes]:
    """Resize a list of frames and split it into patches, without sampling, as transformers does.

    Args:
        frames: pixels ``[H, W, 3]`` of each frame, decoded one by one.
        count: number of frames.
        processor: the video processor.
        limits: processing limits of the content part; `Limits.fps` is the rate of the frames.

    Returns:
        Grid, timestamps of the temporal patches in seconds, and values ``[U, F]``.

    Raises:
        RowError: ``QC-VISION-030``, ``-031``, ``-037``, ``-038``.
    """
    _check_enough(count, processor)
    indices = range(count)
    kept, _ = _resized(frames, indices, processor, limits, "scale all frames to one size")
    assert kept is not None
    grid, values = processor.patches(kept)
    return grid, processor.timestamps(indices, limits.fps or processor.rate), values


def _process(
    source: _FrameSource, processor: VideoProcessor, limits: Limits
) -> tuple[Grid, tuple[float, ...], Bytes]:
    try:
        indices, kept = _sample_frames(source, processor, limits)
    except _FrameCountChanged as other:
        # Packets without a frame or edit lists: the decoded frames count.
        source.rate *= other.count / source.count
        source.count = other.count
        try:
            indices, kept = _sample_frames(source, processor, limits)
        except _FrameCountChanged as again:  # the file changed in between, which `reader` reports
            raise _damaged(f"{again.count} frames, {other.count} before") from None
    grid, values = processor.patches(kept)
    return grid, processor.timestamps(indices, source.rate), values


def _sample_frames(
    source: _FrameSource, processor: VideoProcessor, limits: Limits
) -> tuple[list[int], Tensor]:
    """Indices of the sampled frames, and the resized frames ``[T, C, H, W]``."""
    _check_enough(source.count, processor)
    indices = processor.sample(source.count, source.rate, limits)
    source.select(indices)
    fix = "encode the video again at one size"
    kept, count = _resized(source.frames(), indices, processor, limits, fix)
    if count != source.count:
        raise _FrameCountChanged(count)
    assert kept is not None
    return indices, kept


def _check_enough(count: int, processor: VideoProcessor) -> None:
    if count < processor.temporal:
        raise RowError(
            "QC-VISION-037",
            "has too few frames",
            found=count,
            expected=f"at least {processor.temporal}",
            fix='use {"type": "image"} for a still image',
        )


def _resized(
    frames: Iterable[Bytes | None],
    indices: Sequence[int],
    processor: VideoProcessor,
    limits: Limits,
    fix: str,
) -> tuple[Tensor | None, int]:
    """The resized frames ``[T, C, H, W]``, and the number of all frames.

    Args:
        frames: pixels of the selected frames in order; ``None`` for each other frame.
        indices: of the selected frames.
        processor: the video processor.
        limits: processing limits of the content part.
        fix: for frames of different sizes.
    """
    kept: Tensor | None = None
    size, shape = (0, 0), (0, 0)
    count = place = 0
    for frame in frames:
        if frame is not None and place < len(indices):
            if kept is None:
                shape = frame.shape[:2]
                size = _size(processor, len(indices), shape, limits)
                kept = torch.empty(len(indices), 3, *size, dtype=torch.uint8)
            if frame.shape[:2] != shape:
                raise RowError(
                    "QC-VISION-038",
                    "has frames of different sizes",
                    found=f"{frame.shape[1]} x {frame.shape[0]} at frame {count}",
                    expected=f"{shape[1]} x {shape[0]}, as in the first sampled frame",
                    fix=fix,
                )
            kept[place] = processor.resize(frame, size)
            place += 1
        count += 1
    return kept, count


def _size(
    processor: VideoProcessor, count: int, shape: tuple[int, ...], limits: Limits
) -> tuple[int, int]:
    height, width = shape
    images.check_size(width, height)
    try:
        return processor.size(count, height, width, limits)
    except ValueError as error:
        raise RowError(
            "QC-VISION-031", "the processor refuses the aspect ratio", found=str(error)
        ) from None


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


class _AnimatedImage:
    """An animated image, opened by Pillow."""

    def __init__(self, image: Any) -> None:
        self._image = image
        self._selected: frozenset[int] = frozenset()
        self.count = int(getattr(image, "n_frames", 1))
        _check_frames(
            self.count,
            (image.width, image.height),
            MAX_ANIMATED_FRAMES,
            MAX_ANIMATED_PIXELS,
            "convert it to MP4",
        )
        total = 0.0
        for number in range(self.count):
            image.seek(number)
            image.load()  # a WebP frame has its duration only after loading
            duration = image.info.get("duration", 0)
            valid = isinstance(duration, int | float) and math.isfinite(duration) and duration > 0
            total += duration / 1000 if valid else _DEFAULT_DURATION
        self.rate = self.count / total

    def select(self, indices: Sequence[int]) -> None:
        self._selected = frozenset(indices)

    def frames(self) -> Iterator[NDArray[np.uint8] | None]:
        for number in range(self.count):
            if number in self._selected:
                self._image.seek(number)
                yield images.to_rgb(self._image)
            else:
                yield None


class _VideoFile:
    """A video file, decoded by PyAV; each pass reopens it."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._selected: frozenset[int] = frozenset()
        self.count, self.rate = self._scan()

    def select(self, indices: Sequence[int]) -> None:
        self._selected = frozenset(indices)

    def _scan(self) -> tuple[int, float]:
        """Number of packets, which usually equals the number of frames, and the mean frame rate."""
        count, first, last = 0, math.inf, -math.inf
        with self._open() as (container, stream):
            size = stream.codec_context.width, stream.codec_context.height
            images.check_size(*size)
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    count += 1
                    _check_frames(count, size, MAX_VIDEO_FRAMES, MAX_VIDEO_PIXELS, _SHORTEN)
                    if packet.pts is not None:
                        first, last = min(first, packet.pts), max(last, packet.pts)
            stated = float(stream.average_rate or 0)
            span = (last - first) * float(stream.time_base or 0) if last >= first else 0.0
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

        self._file.seek(0)
        with av.open(self._file, format=self._name, metadata_errors="ignore") as container:
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
            stream.codec_context.options = {"max_pixels": str(images.MAX_PIXELS)}
            yield container, stream

    def frames(self) -> Iterator[NDArray[np.uint8] | None]:
        decoded = 0
        with self._open() as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                # A packet may have several frames, and a frame may differ from the declared size.
                decoded += frame.width * frame.height
                if decoded > MAX_VIDEO_PIXELS:
                    amount = f"{decoded} in {number + 1} frames"
                    raise _too_many_pixels(amount, MAX_VIDEO_PIXELS, _SHORTEN)
                if frame.is_corrupt:
                    raise _damaged(f"frame {number} is incomplete")
                if number not in self._selected:
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
        av.error.FFmpegError, OSError, ValueError, TypeError, LookupError, EOFError, MemoryError,
        OverflowError, RuntimeError, NotImplementedError, ZeroDivisionError,
    )  # fmt: skip
    try:
        yield
    except decoder_errors as error:
        raise _damaged(getattr(error, "strerror", None) or str(error)) from None


def _damaged(reason: str) -> RowError:
    return RowError(
        "QC-VISION-035",
        "is damaged",
        found=reason[:200],
        expected="a video that decodes to its end",
        fix="encode the video again",
    )
