"""Videos: frames, times and numbers are transformers', bit for bit."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.media_kit import (
    Array,
    animated,
    frames,
    payload,
    picture,
    saved,
    stock_images,
    stock_videos,
    video,
)  # fmt: skip
from support.tiers import fast

#: Frames, width, height, frames a second: short and long, odd and even, small, flat and tall.
SAMPLES = [
    (2, 64, 48, 30), (3, 64, 48, 30), (4, 33, 47, 30), (5, 97, 65, 25), (6, 16, 16, 10),
    (7, 20, 130, 24), (8, 310, 20, 24), (9, 64, 64, 2), (10, 64, 64, 1), (11, 71, 53, 2),
    (12, 64, 48, Fraction(30000, 1001)), (15, 64, 48, Fraction(24000, 1001)), (31, 64, 48, 12),
    (60, 48, 32, 60), (61, 48, 32, 30), (90, 40, 40, 30), (91, 40, 40, 30), (121, 32, 32, 24),
    (150, 32, 48, 50), (200, 32, 32, 25), (301, 16, 32, 30), (13, 256, 256, 5),
]  # fmt: skip


def check(reader: Any, stock: Any, data: bytes, pixels: Array, rate: float, **options: Any) -> Any:
    """Compare a file with what the stock processor makes of its frames."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

    seen = reader.read(payload(data, "video", **options))
    made = reader.batch([seen], torch.arange(seen.tokens))
    metadata = VideoMetadata(total_num_frames=len(pixels), fps=float(rate))
    expected = stock.preprocess(
        [pixels], video_metadata=[metadata], do_sample_frames=True, return_metadata=True,
        return_tensors="pt", cap_pixels_per_frame=False,
        **({"fps": options["fps"]} if "fps" in options else {}),
    )  # fmt: skip
    assert seen.grid == tuple(expected["video_grid_thw"].flatten().tolist())
    assert torch.equal(made.pixel_values(), expected["pixel_values_videos"].flatten(0, -2))
    told = expected["video_metadata"][0]
    times = Qwen3VLProcessor._calculate_timestamps(None, told.frames_indices, told.fps, 2)
    assert seen.timestamps == pytest.approx(times, abs=1e-9)
    assert len(seen.timestamps) == seen.grid[0]
    return seen


@pytest.mark.parametrize(
    ("count", "width", "height", "rate"), fast(SAMPLES, *SAMPLES[::3], names=4)
)
def test_numbers_are_the_stock_processors(
    reader: Any, shared: Path, monkeypatch: pytest.MonkeyPatch, count: int, width: int,
    height: int, rate: float,
) -> None:  # fmt: skip
    pixels = frames(count, width, height, seed=count)
    stock = stock_videos(shared, monkeypatch)
    check(reader, stock, video(pixels, rate), pixels, rate)


def test_an_odd_number_has_its_last_frame_twice(reader: Any) -> None:
    """Nine frames at 2 a second are all looked at; the tenth is the ninth, at 4 seconds."""
    seen = reader.read(payload(video(frames(9, 64, 64), 2), "video"))
    assert seen.grid[0] == 5
    assert seen.timestamps == (0.25, 1.25, 2.25, 3.25, 4.0)
    last = reader.batch([seen], torch.arange(seen.tokens)).values
    last = last.view(5, -1, 3, 2, 256)[-1]
    assert torch.equal(last[:, :, 0], last[:, :, 1])


@pytest.mark.parametrize(
    ("form", "codec", "layout"),
    [("mp4", "libx264", "yuv420p"), ("webm", "libvpx-vp9", "yuv420p"), ("avi", "mpeg4", "yuv420p"),
     ("mov", "mpeg4", "yuv420p"), ("webm", "libvpx", "yuv420p"), ("mp4", "libx264", "yuv444p10le")],
)  # fmt: skip
def test_containers_and_codecs(
    reader: Any, shared: Path, monkeypatch: pytest.MonkeyPatch, form: str, codec: str, layout: str
) -> None:
    import av

    data = video(frames(35, 64, 48), 30, form, codec, layout)
    with av.open(io.BytesIO(data)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 35
    check(reader, stock_videos(shared, monkeypatch), data, np.stack(decoded), 30)


@pytest.mark.parametrize("fps", [5e-324, 0.5, 1, 4, 30.0, 200])
def test_frames_a_second_that_a_part_asks_for(
    reader: Any, shared: Path, monkeypatch: pytest.MonkeyPatch, fps: float
) -> None:
    pixels = frames(61, 48, 32)
    stock = stock_videos(shared, monkeypatch)
    seen = check(reader, stock, video(pixels), pixels, 30, fps=fps)
    assert seen.grid[0] == {5e-324: 2, 0.5: 2, 1: 2, 4: 4, 30.0: 31, 200: 31}[fps]


@pytest.mark.parametrize(("most", "patches"), [(2, 1), (3, 2), (7, 4), (768, 4)])
def test_most_frames_that_a_part_asks_for(
    reader: Any, shared: Path, monkeypatch: pytest.MonkeyPatch, most: int, patches: int
) -> None:
    pixels = frames(121, 48, 32)
    stock = stock_videos(shared, monkeypatch, max_frames=most, min_frames=min(4, most))
    seen = check(reader, stock, video(pixels), pixels, 30, max_frames=most)
    assert seen.grid[0] == patches


def test_resizing_is_pillows_but_for_rounding() -> None:
    """An implementation that shares no code with torch's.

    Both round after each of the two passes, torch with coarser weights: a level apart, and two in
    some ten of a million numbers where a picture grows.
    """
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    from qcore_multimodal.processor import VideoProcessor

    videos = VideoProcessor("video", Qwen3VLVideoProcessor())
    for width, height, to in [(97, 65, (64, 96)), (640, 480, (96, 128)), (33, 20, (320, 512))]:
        image = picture("RGB", width, height, seed=width)
        ours = videos.resize(np.array(image), to).movedim(0, -1).numpy().astype(int)
        theirs = np.array(image.resize(to[::-1], Image.Resampling.BICUBIC)).astype(int)
        apart = np.abs(ours - theirs)
        assert apart.max() <= (2 if to[0] > height else 1)
        assert (apart > 1).mean() < 1e-4


def test_every_byte_has_the_stock_processors_number(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcore_multimodal.processor import CLASSES, VideoProcessor

    changed = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.27, 0.26, 0.275]}
    from support.media_kit import settings

    ours = VideoProcessor("video", CLASSES["video"](**{**settings(shared, "video"), **changed}))
    stock = stock_videos(shared, monkeypatch, **changed)
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    expected = stock.rescale_and_normalize(
        ramp, True, stock.rescale_factor, True, tuple(stock.image_mean), tuple(stock.image_std)
    )
    assert torch.equal(ours.table(), expected[:, 0])


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("count", [2, 7])
def test_animated_pictures(
    reader: Any, shared: Path, monkeypatch: pytest.MonkeyPatch, form: str, count: int
) -> None:
    data = animated(count, form, duration=250)
    decoded = []
    with Image.open(io.BytesIO(data)) as image:
        for number in range(count):
            image.seek(number)
            decoded.append(np.array(image.convert("RGB")))
    check(reader, stock_videos(shared, monkeypatch), data, np.stack(decoded), 4)


def test_a_rate_that_varies_is_its_mean(reader: Any) -> None:
    """Nine frames, the first eight in a second and the last four seconds later."""
    times = [0, 125, 250, 375, 500, 625, 750, 875, 5000]
    seen = reader.read(payload(video(frames(9, 64, 64), 8, times=times), "video"))
    mean = 8 / 5
    assert seen.grid[0] == 5
    assert seen.timestamps[-1] == pytest.approx(8 / mean, rel=0.13)
    assert seen.timestamps[0] == pytest.approx(0.5 / mean, rel=0.13)


@pytest.mark.parametrize(("turn", "k"), [(90, 3), (180, 2), (270, 1)])
def test_a_phones_rotation_is_applied(reader: Any, turn: int, k: int) -> None:
    import struct

    pixels = frames(4, 96, 32)
    data = video(pixels, 2, "mp4", "libx264", "yuv420p")
    at = data.index(b"tkhd") + 4 + 40  # the matrix of a header of version 0
    one = 1 << 16
    first = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[turn]
    matrix = struct.pack(">9i", first[0], first[1], 0, first[2], first[3], 0, 0, 0, 1 << 30)
    turned = reader.read(payload(data[:at] + matrix + data[at + 36 :], "video"))
    plain = reader.read(payload(data, "video"))
    assert turned.grid[1:] == (plain.grid[1:] if turn == 180 else plain.grid[:0:-1])
    shown = []
    for seen in (plain, turned):
        t, h, w = seen.grid
        values = reader.batch([seen], torch.arange(seen.tokens)).values
        cut = values.view(t, h // 2, w // 2, 2, 2, 3, 2, 16, 16)
        whole = cut.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * t, h * 16, w * 16, 3)
        shown.append(whole[0].numpy().astype(int))
    # Turned by 90 degrees clockwise, as the matrix says; the chroma of each half is its own.
    assert np.abs(np.rot90(shown[0], k) - shown[1]).mean() < 2


def test_a_count_that_the_packets_do_not_tell(
    reader: Any, monkeypatch: pytest.MonkeyPatch, shared: Path
) -> None:
    from qcore_multimodal.video_decoder import Video

    pixels, init = frames(40, 48, 32), Video.__init__

    def counted(film: Any, process: Any, about: dict[str, Any]) -> None:
        init(film, process, {**about, "count": 50, "rate": about["rate"] * 50 / 40})

    monkeypatch.setattr(Video, "__init__", counted)
    check(reader, stock_videos(shared, monkeypatch), video(pixels), pixels, 30)


def test_images_and_videos_in_one_batch_keep_their_own_arithmetic(
    reader: Any, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, image = frames(4, 64, 64), picture("RGB", 256, 256)
    film = reader.read(payload(video(pixels, 2), "video"))
    still = reader.read(payload(saved(image, "PNG")))
    both = reader.batch([film, still], torch.arange(film.tokens + still.tokens)).pixel_values()
    assert torch.equal(both[: film.units], reader.batch([film], torch.arange(1)).pixel_values())
    expected = stock_images(shared).preprocess([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(both[film.units :], expected)
