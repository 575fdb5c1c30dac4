"""Previews of images: small copies as data URLs, and nothing for what cannot be read."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image
from support.media_kit import frames, video
from support.media_kit import payload as media_payload

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


def shown(url: str) -> Image.Image:
    assert url.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_video_shows_its_first_frame(reader: Any) -> None:
    pixels = frames(4, 320, 240)
    pixels[0] = (250, 10, 10)
    url = reader.preview(media_payload(video(pixels), "video"), 160)
    with shown(url) as small:
        assert small.size == (160, 120)
        red, green, blue = small.convert("RGB").getpixel((80, 60))
        assert red > 200
        assert max(green, blue) < 60


def test_a_list_of_frames_shows_the_first(reader: Any) -> None:
    listed = Payload(
        kind="video", sha256="", options={}, frames=(payload(png(300, 200)), payload(png(300, 200)))
    )
    with shown(reader.preview(listed, 60)) as small:
        assert small.size == (60, 40)


def test_a_video_that_cannot_be_read_has_none(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reader.preview(media_payload(b"no video", "video"), 160) == ""
    monkeypatch.setattr("qcore_multimodal.preview.LARGEST_VIDEO", 1000)
    assert reader.preview(media_payload(video(frames(4, 64, 48)), "video"), 160) == ""
