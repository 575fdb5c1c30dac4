"""Previews of images: small copies as data URLs, and nothing for what cannot be read."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.media_kit import frames, picture, saved, video
from support.media_kit import payload as media_payload

from qcore.api import Payload, RowError
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


@pytest.mark.parametrize("size", [0, 160])
@pytest.mark.parametrize(
    ("mode", "form", "width", "height"),
    [
        ("RGB", "PNG", 31, 33), ("RGBA", "PNG", 640, 481), ("L", "JPEG", 1000, 17),
        ("CMYK", "JPEG", 257, 255), ("P", "GIF", 3, 500), ("RGB", "WEBP", 1900, 1300),
    ],
)  # fmt: skip
def test_a_reader_for_people_measures_without_values(
    new_reader: Any, cache_home: Path, size: int, mode: str, form: str, width: int, height: int
) -> None:
    """What is shown is what a run reads, although nothing is resized or cached."""
    given = media_payload(saved(picture(mode, width, height), form), min_pixels=65536)
    measured = new_reader().measuring(size).read(given)
    assert not list(cache_home.rglob("*.media"))
    assert measured == new_reader().read(given)
    assert list(cache_home.rglob("*.media"))


def test_a_reader_for_people_refuses_what_a_run_refuses(new_reader: Any) -> None:
    whole = saved(picture("RGB", 300, 200), "PNG")
    for data in (whole[:-30], b"<html>", saved(picture("RGB", 900, 4), "PNG")):
        with pytest.raises(RowError) as expected:
            new_reader().read(media_payload(data))
        with pytest.raises(RowError) as caught:
            new_reader().measuring(160).read(media_payload(data))
        assert (caught.value.code, caught.value.found) == (
            expected.value.code, expected.value.found,
        )  # fmt: skip


def test_a_picture_is_decoded_once(new_reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = new_reader().measuring(160)
    given = media_payload(saved(picture("RGB", 1600, 1200), "JPEG"))
    reader.read(given)
    monkeypatch.setattr("qcore_multimodal.reader.preview", lambda *_: pytest.fail("decoded again"))
    for size, pixels in ((160, (160, 120)), (80, (80, 60)), (48, (48, 36))):
        with shown(reader.preview(given, size)) as small:
            assert small.size == pixels


def test_few_copies_are_kept(new_reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcore_multimodal.preview._KEPT", 3)
    reader = new_reader().measuring(16)
    for seed in range(9):
        reader.read(media_payload(saved(picture("RGB", 40, 30, seed), "PNG")))
    assert len(reader._previews._kept) == 3
