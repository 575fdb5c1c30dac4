"""Previews of images and videos for people: small JPEG data URLs, as `qcore data show` embeds them.

This file decides their size limits. A payload that cannot be read has no preview; `images` reports
what is wrong with it where it is trained on.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

from qcore.api import Payload, RowError

if TYPE_CHECKING:
    from .video_decoder import Decoder

LARGEST = 64 << 20  #: pixels of an image that gets a preview
LARGEST_VIDEO = 1 << 31  #: pixels of all frames of a video that gets one


def preview(payload: Payload, size: int) -> str:
    """A data URL of a small copy of an image; empty if it cannot be made.

    Args:
        payload: of an image.
        size: pixels of the longer side.
    """
    from PIL import Image

    try:
        with payload.open() as file, Image.open(file) as image:
            if image.width * image.height > LARGEST:
                return ""
            image.draft("RGB", (2 * size, 2 * size))
            return _small(image, size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""


def video_preview(payload: Payload, size: int, decoder: Decoder) -> str:
    """A data URL of a small copy of a video's first frame; empty if it cannot be made.

    Args:
        payload: of a video.
        size: pixels of the longer side.
        decoder: decodes the file.
    """
    from PIL import Image

    if payload.frames:
        return preview(payload.frames[0], size)
    try:
        with payload.open() as file, decoder.open(file) as video:
            if video.count * video.pixels > LARGEST_VIDEO:
                return ""
            (frame, *_) = video.frames([0])
            return _small(Image.fromarray(frame), size)
    except (OSError, ValueError, RowError):
        return ""


def _small(image: Any, size: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((size, size))
    made = io.BytesIO()
    small.save(made, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(made.getvalue()).decode("ascii")
