"""What a row may ask of the processor: pixels, and of a video frames.

This file decides which keys a part may have beside its bytes and which values. What the bounds
are without them is the processor's. It imports no torch.

- ``QC-VISION-025`` a value of the wrong type or out of bounds.
- ``QC-VISION-026`` a key that is of another kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcore.api import RowError

KEYS = ("min_pixels", "max_pixels", "fps", "max_frames")
_VIDEO_KEYS = ("fps", "max_frames")
_MAX_FPS = 240.0  # frames a second; no processor is asked for more


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one medium is processed to.

    Attributes:
        min_pixels: pixels, of all frames of a video together.
        max_pixels: the same.
        fps: frames a second that are looked at; the processor's where it is ``None``.
        max_frames: most frames that are looked at; the processor's where it is ``None``.
    """

    min_pixels: int
    max_pixels: int
    fps: float | None = None
    max_frames: int | None = None


def parse_limits(
    kind: str, options: Mapping[str, Any], bounds: tuple[int, int], frames: tuple[int, int] | None
) -> Limits:
    """The limits of a part.

    Args:
        kind: ``image`` or ``video``.
        options: its keys.
        bounds: least and most pixels that the processor is set to.
        frames: least and most that ``max_frames`` may be; ``None`` for an image.

    Raises:
        RowError: ``QC-VISION-025``, ``QC-VISION-026``.
    """
    for name in options:
        if name not in KEYS or (kind != "video" and name in _VIDEO_KEYS):
            raise RowError(
                "QC-VISION-026",
                f"is no key of a part of type {kind}",
                at=name,
                expected=", ".join(n for n in KEYS if kind == "video" or n not in _VIDEO_KEYS),
                fix="remove it",
            )
    least = _integer(options, "min_pixels", bounds)
    most = _integer(options, "max_pixels", bounds)
    if least is not None and most is not None and least > most:
        raise RowError(
            "QC-VISION-025", "is more than max_pixels", at="min_pixels", found=least,
            expected=f"at most {most}",
        )  # fmt: skip
    return Limits(
        min_pixels=bounds[0] if least is None else least,
        max_pixels=bounds[1] if most is None else most,
        fps=_fps(options),
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
            "is out of the processor's bounds",
            at=name,
            found=repr(value)[:80],
            expected=f"a whole number from {bounds[0]} to {bounds[1]}",
        )
    return value


def _fps(options: Mapping[str, Any]) -> float | None:
    if "fps" not in options:
        return None
    value = options["fps"]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= _MAX_FPS:
        raise RowError(
            "QC-VISION-025",
            "is no rate of frames",
            at="fps",
            found=repr(value)[:80],
            expected=f"a number above 0, up to {_MAX_FPS:g}",
        )
    return float(value)
