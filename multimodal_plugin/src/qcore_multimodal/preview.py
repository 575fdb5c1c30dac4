"""Previews of images for people: small JPEG data URLs, such as for the page of `qcore data show`.

This file decides their size limits. A payload that cannot be read has no preview; `images` reports
what is wrong with it where it is trained on.
"""

from __future__ import annotations

import base64
import io

from qcore.api import Payload

LARGEST = 64 << 20  #: pixels of an image that gets a preview


def preview(payload: Payload, size: int) -> str:
    """A data URL of a small copy of an image; empty if it cannot be made.

    Args:
        payload: of an image.
        size: pixels of the longer side.
    """
    from PIL import Image

    made = io.BytesIO()
    try:
        with payload.open() as file, Image.open(file) as image:
            if image.width * image.height > LARGEST:
                return ""
            image.draft("RGB", (2 * size, 2 * size))
            small = image.convert("RGB")
            small.thumbnail((size, size))
            small.save(made, "JPEG", quality=70)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(made.getvalue()).decode("ascii")
