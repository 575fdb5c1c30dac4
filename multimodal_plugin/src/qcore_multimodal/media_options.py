"""Per-part processing options of a row: ``min_pixels``, ``max_pixels``, ``fps``, ``max_frames``.

This file decides which keys a content part may have besides its bytes, and their allowed values.
The processor provides the defaults. A video that is a list of frames is not sampled: its ``fps``,
or ``sample_fps`` as in Qwen's loader, is the rate at which the frames were taken. It imports no
torch.

- ``QC-VISION-025`` a value with a wrong type or out of bounds.
- ``QC-VISION-026`` an unknown key, or a key of the other kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qcore.api import RowError

KEYS = ("min_pixels", "max_pixels", "fps", "max_frames", "sample_fps")
_SIZE_KEYS = ("min_pixels", "max_pixels")
_IMAGE, _VIDEO, _FRAMES = _SIZE_KEYS, KEYS[:4], (*_SIZE_KEYS, "fps", "sample_fps")
_MAX_FPS = 240.0  # frames per second


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Processing limits of one image or video.

    Attributes:
        min_pixels: minimum number of pixels; for a video, summed over all sampled frames.
        max_pixels: maximum number of pixels, counted likewise.
        fps: sampled frames per second, of a list of frames their rate; ``None`` for the
            processor's default.
        max_frames: maximum number of sampled frames; ``None`` for the processor's default.
    """

    min_pixels: int
    max_pixels: int
    fps: float | None = None
    max_frames: int | None = None


def parse_limits(
    kind: str,
    options: Mapping[str, Any],
    bounds: tuple[int, int],
    frames: tuple[int, int] | None,
    *,
    listed: bool = False,
) -> Limits:
    """Parse the processing options of a content part.

    Args:
        kind: ``image`` or ``video``.
        options: the part's keys and values.
        bounds: minimum and maximum pixels of the processor.
        frames: allowed range of ``max_frames``; ``None`` for an image.
        listed: whether the part is a list of frames.

    Raises:
        RowError: ``QC-VISION-025``, ``QC-VISION-026``.
    """
    known = _FRAMES if listed else _VIDEO if kind == "video" else _IMAGE
    for name in options:
        if name not in known:
            raise RowError(
                "QC-VISION-026",
                f"unknown key for a part of type {kind}",
                at=name,
                expected=", ".join(known),
                fix=_advice(name, listed),
            )
    least = _integer(options, "min_pixels", bounds)
    most = _integer(options, "max_pixels", bounds)
    if least is not None and most is not None and least > most:
        raise RowError(
            "QC-VISION-025", "is greater than max_pixels", at="min_pixels", found=least,
            expected=f"at most {most}",
        )  # fmt: skip
    return Limits(
        min_pixels=bounds[0] if least is None else least,
        max_pixels=bounds[1] if most is None else most,
        fps=_frame_rate(options) if listed else _fps(options, "fps"),
        max_frames=None if frames is None else _integer(options, "max_frames", frames),
    )


def _integer(options: Mapping[str, Any], name: str, bounds: tuple[int, int]) -> int | None:
    if name not in options:
        return None
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int) or not (
        bounds[0] <= value <= bounds[1]
    ):  # fmt: skip
        raise RowError(
            "QC-VISION-025",
            "is outside the processor's bounds",
            at=name,
            found=repr(value)[:80],
            expected=f"a whole number from {bounds[0]} to {bounds[1]}",
        )
    return value


def _advice(name: str, listed: bool) -> str:
    if listed and name == "max_frames":
        return "list only the frames that the model is to see: a list is not sampled"
    return "write fps" if name == "sample_fps" else "remove it"


def _frame_rate(options: Mapping[str, Any]) -> float | None:
    """The rate of a list of frames, which two keys may state."""
    options = dict(options)
    stated = options.get("sample_fps")
    if isinstance(stated, str):  # as in Qwen's documentation: 'sample_fps': '1'
        with suppress(ValueError):
            options["sample_fps"] = float(stated)
    rates = [_fps(options, name) for name in ("fps", "sample_fps") if name in options]
    if len(set(rates)) > 1:
        raise RowError(
            "QC-VISION-025",
            "differs from fps",
            at="sample_fps",
            found=repr(stated)[:80],
            expected=repr(options["fps"]),
            fix="write one of them",
        )
    return rates[0] if rates else None


def _fps(options: Mapping[str, Any], name: str) -> float | None:
    if name not in options:
        return None
    value = options[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= _MAX_FPS:
        raise RowError(
            "QC-VISION-025",
            "invalid frame rate",
            at=name,
            found=repr(value)[:80],
            expected=f"a number above 0, up to {_MAX_FPS:g}",
        )
    return float(value)
