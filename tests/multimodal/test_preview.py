"""Previews of images: small copies as data URLs, and nothing for what cannot be read."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from qcore.api import Payload
from qcore_multimodal.preview import LARGEST, preview


def payload(data: bytes, **more: Any) -> Payload:
    return Payload(kind="image", sha256="", data=data, options={}, **more)


def png(width: int, height: int, mode: str = "RGBA") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, "PNG")
    return stream.getvalue()


def test_a_preview_is_small() -> None:
    url = preview(payload(png(2000, 900)), 160)
    assert url.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as small:
        assert small.size == (160, 72)


def test_what_cannot_be_read_or_is_too_large_has_none() -> None:
    assert preview(payload(b"no image"), 160) == ""
    assert preview(payload(png(8200, LARGEST // 8200 + 1, "1")), 160) == ""
