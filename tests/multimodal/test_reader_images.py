"""Images: the numbers that a tower reads are transformers', bit for bit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.child import in_child
from support.media_kit import payload, picture, saved, stock_images

SIZES = [(1, 1), (3, 500), (31, 33), (47, 300), (256, 256), (257, 255), (640, 481), (1000, 17)]
FORMS = [
    ("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("1", "PNG"),
    ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"),
    ("RGB", "WEBP"), ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "BMP"),
]  # fmt: skip
# Each form with five sizes, all eight in turn: 65 files.
SAMPLES = [
    (mode, form, *SIZES[(number + 3 * step) % len(SIZES)])
    for number, (mode, form) in enumerate(FORMS)
    for step in range(5)
]


def on_white(image: Image.Image, stock: Any) -> Image.Image:
    """The picture as the stock class is to see it: the oldest that is supported drops transparency.

    A checkpoint looks the same under every version, so ours lies on white as under the newest.
    """
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image
    unseen = stock.preprocess([Image.new("RGBA", (64, 64), (0, 0, 0, 0))], return_tensors="pt")
    if bool((unseen["pixel_values"] == 1).all()):
        return image
    clear = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def check(reader: Any, stock: Any, data: bytes, **options: int) -> Any:
    """Compare one file with what the stock processor makes of what Pillow makes of it."""
    seen = reader.read(payload(data, **options))
    made = reader.batch([seen], torch.arange(seen.tokens))
    size = dict(stock.size) | {
        {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}[key]: value
        for key, value in options.items()
    }
    size = {key: value for key, value in size.items() if value is not None}
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = stock.preprocess([on_white(upright, stock)], size=size, return_tensors="pt")
    assert made.grids == (seen.grid,) == (tuple(expected["image_grid_thw"][0].tolist()),)
    assert made.values.dtype == torch.uint8
    assert torch.equal(made.pixel_values(), expected["pixel_values"])
    return seen


@pytest.mark.parametrize(("mode", "form", "width", "height"), SAMPLES)
def test_numbers_are_the_stock_processors(
    reader: Any, shared: Path, mode: str, form: str, width: int, height: int
) -> None:
    data = saved(picture(mode, width, height, seed=width + height), form)
    seen = check(reader, stock_images(shared), data)
    assert seen.units == seen.grid[1] * seen.grid[2]
    assert seen.tokens * 4 == seen.units


@pytest.mark.parametrize(
    "options",
    [
        {"min_pixels": 65536},
        {"max_pixels": 70000},
        {"min_pixels": 200_000, "max_pixels": 300_000},
        {"min_pixels": 1_000_000},
        {"max_pixels": 16_777_216},
    ],
)
def test_pixels_that_a_part_asks_for(reader: Any, shared: Path, options: dict[str, int]) -> None:
    check(reader, stock_images(shared), saved(picture("RGB", 401, 333), "PNG"), **options)


@pytest.mark.slow
@in_child
def test_more_pixels_than_the_processor_takes_are_scaled_down(reader: Any, shared: Path) -> None:
    seen = check(reader, stock_images(shared), saved(picture("L", 5003, 3999), "BMP"))
    assert 0.95 * 16_777_216 < seen.units * 256 <= 16_777_216


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(reader: Any, shared: Path, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = saved(picture("RGB", 300, 200), "JPEG", exif=exif)
    seen = check(reader, stock_images(shared), data)
    assert (seen.grid[1] > seen.grid[2]) == (turn > 4)  # of the upright picture


def test_transparency_is_white(reader: Any) -> None:
    seen = reader.read(payload(saved(Image.new("RGBA", (256, 256), (9, 9, 9, 0)), "PNG")))
    assert (reader.batch([seen], torch.arange(seen.tokens)).values == 255).all()


def test_a_palette_with_a_transparent_colour(reader: Any, shared: Path) -> None:
    image = picture("P", 70, 90)
    check(reader, stock_images(shared), saved(image, "PNG", transparency=bytes(range(256))))
    check(reader, stock_images(shared), saved(image, "GIF", transparency=3))


def test_sixteen_bits_of_a_colour_become_the_upper_eight(reader: Any) -> None:
    import struct
    import zlib

    from support.media_kit import chunk

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 256, 256, 16, 2, 0, 0, 0))
    row = b"\0" + b"\x12\x34\x80\x00\xfe\xff" * 256
    data = (
        b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row * 256)) + chunk(b"IEND", b"")
    )
    seen = reader.read(payload(data))
    values = reader.batch([seen], torch.arange(seen.tokens)).values.view(seen.units, 3, -1)
    assert [set(values[:, channel].flatten().tolist()) for channel in range(3)] == [
        {0x12}, {0x80}, {0xFE},
    ]  # fmt: skip


def test_a_photo_with_previews_of_itself_is_a_still(reader: Any) -> None:
    images = [picture("RGB", 300, 200, seed) for seed in range(2)]
    data = saved(images[0], "MPO", save_all=True, append_images=images[1:])
    assert data.startswith(b"\xff\xd8\xff")
    assert reader.read(payload(data)).grid == reader.read(payload(saved(images[0], "PNG"))).grid


def test_every_byte_has_the_stock_processors_number(reader: Any, shared: Path) -> None:
    """Other means and deviations than a half, so that every rounding shows."""
    from qcore_multimodal.processor import ImageProcessor

    changed = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.27, 0.26, 0.275]}
    stock = stock_images(shared, **changed)
    ramp = np.arange(256 * 256, dtype=np.uint32).reshape(256, 256) % 256
    image = Image.fromarray(np.repeat(ramp.astype(np.uint8)[..., None], 3, -1))
    expected = stock.preprocess([image], do_resize=False, return_tensors="pt")["pixel_values"]
    raw = stock.preprocess(
        [image], do_resize=False, do_rescale=False, do_normalize=False, return_tensors="pt"
    )["pixel_values"]
    table = ImageProcessor("image", stock).table()
    for channel in range(3):
        block = slice(512 * channel, 512 * (channel + 1))
        assert torch.equal(table[channel][raw[:, block].long()], expected[:, block])


def test_many_in_one_batch_in_their_order(reader: Any) -> None:
    seen = [reader.read(payload(saved(picture("RGB", 60 + n, 90, n), "PNG"))) for n in range(3)]
    whole = reader.batch([*seen, seen[0]], torch.arange(9))
    alone = [reader.batch([one], torch.arange(9)).values for one in seen]
    assert torch.equal(whole.values, torch.cat([*alone, alone[0]]))
    assert whole.grids == (*(one.grid for one in seen), seen[0].grid)
    moved = whole.to(torch.device("cpu"))
    assert torch.equal(moved.pixel_values(torch.bfloat16), whole.pixel_values().bfloat16())
    assert torch.equal(whole.pixel_values(start=5, stop=77), whole.pixel_values()[5:77])


def test_an_image_keeps_one_frame_of_its_two(reader: Any, cache_home: Path) -> None:
    seen = reader.read(payload(saved(picture("RGB", 256, 256), "PNG")))
    (entry,) = cache_home.glob("*.media")
    assert 0 < entry.stat().st_size - seen.units * 768 < 1000
