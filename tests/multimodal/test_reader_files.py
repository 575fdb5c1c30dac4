"""The checkpoint's processor files: what is read, what is refused, and what importing costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.media_kit import FILES, VISION, animated, checkpoint, payload, picture, saved
from support.tiers import fast

from qcore.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, shared: Path, cache_home: Path) -> Path:
    """A copy of the real files, to be changed."""
    made = tmp_path / "base"
    made.mkdir()
    for name in FILES:
        (made / name).write_text((shared / "skus" / "processor" / name).read_text())
    return made


def changed(folder: Path, name: str, **values: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


def opened(folder: Path, config: dict[str, Any] | None = None) -> Any:
    """A reader that has seen both kinds."""
    from qcore_multimodal.reader import Reader

    reader = Reader(checkpoint(folder, config), print)
    reader.read(payload(saved(picture("RGB", 64, 64), "PNG")))
    reader.read(payload(animated(3), "video"))
    return reader


def refused(folder: Path, code: str, says: str, config: dict[str, Any] | None = None) -> None:
    with pytest.raises(InputError) as caught:
        opened(folder, config)
    assert caught.value.code == code
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.fix
    assert caught.value.exit_code == 65


IMAGE, VIDEO = FILES
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    (IMAGE, {"image_processor_type": "SiglipImageProcessor"}, "QC-VISION-021", "Siglip"),
    (VIDEO, {"video_processor_type": "Qwen2VLVideoProcessor"}, "QC-VISION-021", "Qwen2VL"),
    (IMAGE, {"size": {"height": 224, "width": 224}}, "QC-VISION-022", "size"),
    (IMAGE, {"size": {"shortest_edge": 0, "longest_edge": 9}}, "QC-VISION-022", "size"),
    (IMAGE, {"size": {"shortest_edge": 90000, "longest_edge": 80000}}, "QC-VISION-022", "size"),
    (VIDEO, {"size": {"shortest_edge": 9, "longest_edge": 1 << 50}}, "QC-VISION-022", "size"),
    (IMAGE, {"image_mean": [0.5, 0.5]}, "QC-VISION-022", "image_mean"),
    (IMAGE, {"image_std": [0.5, 0.5, 0.0]}, "QC-VISION-022", "image_std"),
    (VIDEO, {"image_std": [0.5, 0.5, "a"]}, "QC-VISION-022", "image_std"),
    (IMAGE, {"rescale_factor": 0}, "QC-VISION-022", "rescale_factor"),
    (IMAGE, {"do_rescale": False}, "QC-VISION-022", "do_rescale"),
    (VIDEO, {"do_sample_frames": False}, "QC-VISION-022", "do_sample_frames"),
    (IMAGE, {"resample": 0}, "QC-VISION-022", "resample"),
    (VIDEO, {"fps": 0}, "QC-VISION-022", "fps"),
    (VIDEO, {"num_frames": 8}, "QC-VISION-022", "num_frames"),
    (VIDEO, {"max_frames": -1}, "QC-VISION-022", "max_frames"),
    (IMAGE, {"patch_size": 14}, "QC-VISION-023", "patch_size"),
    (VIDEO, {"temporal_patch_size": 4}, "QC-VISION-023", "temporal_patch_size"),
    (IMAGE, {"merge_size": 4}, "QC-VISION-023", "spatial_merge_size"),
]


@pytest.mark.parametrize(("name", "values", "code", "says"), fast(BAD, *BAD[::3], names=4))
def test_files_that_are_refused(
    folder: Path, name: str, values: dict[str, Any], code: str, says: str
) -> None:
    opened(folder)
    changed(folder, name, **values)
    refused(folder, code, says)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, "QC-VISION-020", name)


def test_images_are_read_without_the_file_for_video(folder: Path) -> None:
    from qcore_multimodal.reader import Reader

    (folder / VIDEO).unlink()
    reader = Reader(checkpoint(folder), print)
    assert reader.read(payload(saved(picture("RGB", 64, 64), "PNG"))).tokens == 64


@pytest.mark.parametrize("text", ["", "{", "[]", '{"size": 1, "size": 2}'])
def test_a_file_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / IMAGE).write_text(text)
    refused(folder, "QC-CKPT-002", IMAGE)


def test_other_channels_than_three(folder: Path) -> None:
    config = {"model_type": "qwen3_5", "vision_config": VISION | {"in_channels": 1}}
    refused(folder, "QC-VISION-023", "in_channels", config)


def test_the_file_that_transformers_5_saves_comes_first(folder: Path, shared: Path) -> None:
    """One file for all processors, as ``save_pretrained`` of Qwen3VLProcessor writes it."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    stock = [
        make(**{
            key: value for key, value in json.loads((folder / name).read_text()).items()
            if not key.endswith(("_class", "_type"))
        })
        for make, name in [(Qwen2VLImageProcessorPil, IMAGE), (Qwen3VLVideoProcessor, VIDEO)]
    ]  # fmt: skip
    plain = opened(folder)
    saves = {"image_processor": stock[0].to_dict(), "video_processor": stock[1].to_dict()}
    for name in FILES:
        (folder / name).write_text("{}")
    (folder / "processor_config.json").write_text(json.dumps(saves))
    combined = opened(folder)
    for part in (payload(saved(picture("RGB", 77, 99), "PNG")), payload(animated(4), "video")):
        one, other = plain.read(part), combined.read(part)
        assert one == other
        assert torch.equal(
            plain.batch([one], torch.arange(1)).pixel_values(),
            combined.batch([other], torch.arange(1)).pixel_values(),
        )


def test_an_older_combined_file_without_them_is_passed_over(folder: Path) -> None:
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen3VLProcessor"}')
    opened(folder)
    (folder / "processor_config.json").write_text('{"image_processor": 3}')
    refused(folder, "QC-VISION-022", "image_processor")


def test_nothing_outside_the_folder_is_read(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    (folder / IMAGE).rename(outside)
    (folder / IMAGE).symlink_to(outside)
    refused(folder, "QC-CKPT-003", "leaves the model folder")


def test_what_it_says_of_itself(reader: Any) -> None:
    from qcore_multimodal.placeholders import PADS
    from qcore_multimodal.plugin import VISION
    from qcore_multimodal.processor import CLASSES
    from qcore_multimodal.processor_files import _CLASSES, _FILES

    assert reader.kinds == VISION.kinds == ("image", "video")
    # Each of these says something of every kind, in this order.
    assert all([*one] == [*reader.kinds] for one in (CLASSES, _FILES, _CLASSES, PADS))
    assert reader.keys == ("min_pixels", "max_pixels", "fps", "max_frames", "sample_fps")


def test_importing_the_plugins_modules_without_torch() -> None:
    """What discovery and the check of rows import stays light."""
    names = [
        "plugin",
        "media_options",
        "media",
        "containers",
        "processor_files",
        "cache",
    ]
    code = (
        "import sys\n"
        + "".join(f"import qcore_multimodal.{name}\n" for name in names)
        + "print(sorted({'torch', 'transformers', 'PIL', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
