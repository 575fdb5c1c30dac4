"""Previews of images and videos for people: small JPEG data URLs, as `qcore data show` embeds them.

This file decides their size limits. A payload that cannot be read has no preview; `images` reports
what is wrong with it where it is trained on.
"""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qcore.api import Payload, RowError

if TYPE_CHECKING:
    from .video_decoder import Decoder

LARGEST = 64 << 20  #: pixels of an image that gets a preview
_KEPT = 256  #: images whose copies are kept: rows are rendered in chunks before they are shown
LARGEST_VIDEO = 1 << 31  #: pixels of all frames of a video that gets one


class PreviewCache:
    """Small copies of the images that were decoded last, so that none is decoded twice.

    Args:
        size: pixels of the longer side of a copy; 0: none is kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def put(self, sha256: str, picture: NDArray[np.uint8]) -> None:
        """Keep a copy of a decoded image ``[H, W, 3]``."""
        if not self._size:
            return
        from PIL import Image

        height, width = picture.shape[:2]
        if width * height > LARGEST:
            return
        # Every second pixel of a large image is enough, and reduces what is filtered.
        step = max(1, max(height, width) // (4 * self._size))
        small = Image.fromarray(np.ascontiguousarray(picture[::step, ::step]))
        small.thumbnail((self._size, self._size))
        self._kept[sha256] = small
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)

    def get(self, sha256: str, size: int) -> str:
        """A data URL of a copy of at most `size` pixels; empty if none is kept."""
        small = self._kept.get(sha256)
        return "" if small is None or size > self._size else _small(small, size)


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
