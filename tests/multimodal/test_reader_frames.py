"""A video as a list of frame files: pixels, times and token ids are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.media_kit import (
    file_payload,
    frames,
    list_payload,
    payload,
    picture,
    saved,
    stock_images,
    stock_videos,
)
from support.tiers import fast
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3VLProcessor
from transformers.image_utils import load_image
from transformers.video_utils import VideoMetadata

from qcore.api.media import RowError

TEXT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What moves?<|im_end|>\n"


class Processor(Qwen3VLProcessor):
    """Without the check of its parts' classes, which looks for torchvision."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        pass


def files(folder: Path, count: int, width: int, height: int) -> list[Path]:
    """Frames as files; the second is a palette image, the third a JPEG."""
    made = []
    for number, pixels in enumerate(frames(count, width, height, seed=count)):
        image = Image.fromarray(pixels)
        path = folder / f"f{number}.{'jpg' if number == 2 else 'png'}"
        (image.quantize(64) if number == 1 else image).save(path)
        made.append(path)
    return made


@pytest.mark.parametrize(
    ("count", "width", "height", "options", "rate"),
    fast([
        (2, 64, 48, {"fps": 2}, 2),
        (3, 97, 65, {}, 2),
        (4, 33, 47, {"sample_fps": 0.5}, 0.5),
        (5, 128, 160, {"sample_fps": "1"}, 1),
        (9, 64, 64, {"fps": 29.97, "sample_fps": 29.97}, 29.97),
        (31, 40, 40, {"fps": 30}, 30),  # far more than 2 frames per second: nothing is sampled
    ], (3, 97, 65, {}, 2), (9, 64, 64, {"fps": 29.97, "sample_fps": 29.97}, 29.97), names=5),
)  # fmt: skip
def test_pixels_times_and_ids_are_the_stock_processors(
    reader: Any, shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    count: int, width: int, height: int, options: dict[str, Any], rate: float,
) -> None:  # fmt: skip
    paths = files(tmp_path, count, width, height)
    seen = reader.read(list_payload(paths, **options))
    made = reader.batch([seen], torch.arange(seen.tokens))
    tokenizer = shared / "skus/tokenizer/tokenizer.json"
    stock = Processor(
        stock_images(shared),
        PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)),
        stock_videos(shared, monkeypatch),
    )
    metadata = VideoMetadata(total_num_frames=count, fps=rate, frames_indices=[*range(count)])
    # The frames that transformers' own loader without torchvision reads of the files.
    stacked = np.stack([np.asarray(load_image(str(path)).convert("RGB")) for path in paths])
    expected = stock(
        text=[TEXT], videos=[stacked], return_tensors="pt",
        videos_kwargs={
            "video_metadata": [metadata], "do_sample_frames": False,
            "cap_pixels_per_frame": False,
        },
    )  # fmt: skip
    assert seen.grid == tuple(expected["video_grid_thw"].flatten().tolist())
    assert torch.equal(made.pixel_values(), expected["pixel_values_videos"].flatten(0, -2))
    times = Qwen3VLProcessor._calculate_timestamps(None, [*range(count)], rate, 2)
    assert seen.timestamps == pytest.approx(times, abs=1e-9)
    ids = Tokenizer.from_file(str(tokenizer)).encode(reader.expand(TEXT, [seen])).ids
    assert ids == expected["input_ids"][0].tolist()


def test_frames_in_the_row_and_in_files_are_the_same(reader: Any, tmp_path: Path) -> None:
    paths = files(tmp_path, 3, 64, 48)
    one = reader.read(list_payload(paths))
    mixed = reader.read(list_payload([paths[0].read_bytes(), *paths[1:]]))
    assert mixed.digest == one.digest
    assert reader.read(list_payload(paths[::-1])).digest != one.digest
    assert reader.read(list_payload(paths, fps=4)).timestamps[-1] == one.timestamps[-1] / 2


def test_evicted_frames_are_read_again(reader: Any, tmp_path: Path, cache_home: Path) -> None:
    paths = files(tmp_path, 4, 64, 48)
    seen = reader.read(list_payload([paths[0].read_bytes(), *paths[1:]]))
    values = reader.batch([seen], torch.arange(1)).values
    for entry in cache_home.glob("*.media"):
        entry.unlink()
    assert torch.equal(reader.batch([seen], torch.arange(1)).values, values)


PNG = saved(picture("RGB", 64, 48), "PNG")
OTHER = saved(picture("RGB", 48, 64), "PNG")


@pytest.mark.parametrize(
    ("given", "options", "code", "says"),
    [
        ([PNG], {}, "QC-VISION-037", "at least 2"),
        ([PNG, OTHER], {}, "QC-VISION-038", "48 x 64 at frame 1"),
        ([PNG, PNG[:900]], {}, "QC-VISION-028", "video[1]"),
        ([PNG, b"text"], {}, "QC-VISION-027", "video[1]"),
        ([PNG, PNG], {"max_frames": 4}, "QC-VISION-026", "not sampled"),
        ([PNG, PNG], {"fps": 2, "sample_fps": 1}, "QC-VISION-025", "one of them"),
        ([PNG, PNG], {"fps": "2"}, "QC-VISION-025", "fps"),
        ([PNG, PNG], {"sample_fps": "fast"}, "QC-VISION-025", "sample_fps"),
        ([PNG, PNG], {"sample_fps": 0}, "QC-VISION-025", "sample_fps"),
        ([PNG, PNG], {"raw_fps": 30}, "QC-VISION-026", "raw_fps"),
    ],
)
def test_bad_lists(
    reader: Any, cache_home: Path, given: list[bytes], options: dict[str, Any], code: str, says: str
) -> None:
    with pytest.raises(RowError) as caught:
        reader.read(list_payload(given, **options))
    assert caught.value.code == code
    error = caught.value.error(Path("rows.jsonl"), 7)
    assert says in f"{error.message} {error.fix}"
    assert not cache_home.exists()


def test_a_list_is_no_image(reader: Any, tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1, 64, 48)
    several = list_payload([path, path])
    with pytest.raises(RowError) as caught:
        reader.read(type(several)(kind="image", sha256="0" * 64, frames=several.frames, options={}))
    assert caught.value.code == "QC-DATA-006"


def test_a_frame_that_changes_is_refused_by_name(reader: Any, tmp_path: Path) -> None:
    paths = files(tmp_path, 2, 64, 48)
    part = list_payload(paths)
    paths[1].write_bytes(PNG)
    with pytest.raises(RowError) as caught:
        reader.read(part)
    assert caught.value.code == "QC-VISION-042"
    assert (caught.value.at, "f1.png" in str(caught.value.found)) == ("video[1]", True)
    assert payload(PNG).sha256 == file_payload(paths[1]).sha256
