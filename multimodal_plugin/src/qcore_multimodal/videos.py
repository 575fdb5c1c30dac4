"""Sampling and resizing of videos: which frames become patches, and their times.

This file decides that only the frames that the processor samples are kept, each resized when it
arrives, and that a list of frame files is not sampled, as in transformers. `video_decoder` decodes
the frames of a file in another process; `processor` computes sizes and patches.

- ``QC-VISION-035`` a file whose number of frames differs at every reading.
- ``QC-VISION-037`` too few frames.
- ``QC-VISION-038`` frames of different sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from qcore.api import RowError

from . import images
from .media_options import Limits
from .video_frames import damaged

if TYPE_CHECKING:
    from .processor import Bytes, Grid, VideoProcessor
    from .video_decoder import Decoder, Video


def process(
    file: BinaryIO, processor: VideoProcessor, limits: Limits, decoder: Decoder
) -> tuple[Grid, tuple[float, ...], Bytes]:
    """Decode, sample and resize a video, and split it into patches.

    Args:
        file: the video file.
        processor: the video processor.
        limits: processing limits of the content part.
        decoder: decodes the file.

    Returns:
        Grid, timestamps of the temporal patches in seconds, and values ``[U, F]``.

    Raises:
        RowError: ``QC-VISION-028``, ``-030``, ``-031``, ``-033`` to ``-039``, ``-046``.
    """
    with decoder.open(file) as video:
        listed = video.count
        indices, kept = _sampled(video, processor, limits)
        if video.count != listed:
            # Packets without a frame or edit lists: the decoded frames count.
            video.rate *= video.count / listed
            listed = video.count
            indices, kept = _sampled(video, processor, limits)
            if video.count != listed:  # the file changed in between, which `reader` reports
                raise damaged(f"{video.count} frames, {listed} before")
        rate = video.rate
    assert kept is not None
    grid, values = processor.patches(kept)
    return grid, processor.timestamps(indices, rate), values


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
    kept = _resized(frames, indices, processor, limits, "scale all frames to one size")
    assert kept is not None
    grid, values = processor.patches(kept)
    return grid, processor.timestamps(indices, limits.fps or processor.rate), values


def _sampled(
    video: Video, processor: VideoProcessor, limits: Limits
) -> tuple[list[int], Tensor | None]:
    """Indices of the sampled frames, and the resized frames ``[T, C, H, W]``."""
    _check_enough(video.count, processor)
    indices = processor.sample(video.count, video.rate, limits)
    fix = "encode the video again at one size"
    return indices, _resized(video.frames(indices), indices, processor, limits, fix)


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
    frames: Iterable[Bytes],
    indices: Sequence[int],
    processor: VideoProcessor,
    limits: Limits,
    fix: str,
) -> Tensor | None:
    """The resized frames ``[T, C, H, W]``; ``None`` without frames.

    Args:
        frames: pixels of the frames in order; they may be fewer than `indices`.
        indices: of the frames in the video.
        processor: the video processor.
        limits: processing limits of the content part.
        fix: for frames of different sizes.
    """
    kept: Tensor | None = None
    size, shape = (0, 0), (0, 0)
    for place, frame in enumerate(frames):
        if kept is None:
            shape = frame.shape[:2]
            size = _size(processor, len(indices), shape, limits)
            kept = torch.empty(len(indices), 3, *size, dtype=torch.uint8)
        if frame.shape[:2] != shape:
            raise RowError(
                "QC-VISION-038",
                "has frames of different sizes",
                found=f"{frame.shape[1]} x {frame.shape[0]} at frame {indices[place]}",
                expected=f"{shape[1]} x {shape[0]}, as in the first sampled frame",
                fix=fix,
            )
        kept[place] = processor.resize(frame, size)
    return kept


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
