"""Rows with media as other tools write them, through `dataset` with a tiny checkpoint.

All rows show the same picture, so they must give the same token ids and the same digest.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bad_media_kit import PNG, conversation
from support.media_kit import frames, picture, saved

from qcore.data.dataset import Dataset, dataset
from qcore.data.sources.source import Source
from qcore.plugins.resolve_model import identify

QUESTION = {"type": "text", "text": "Which color?"}
ENCODED = base64.b64encode(PNG).decode()
URL = f"data:image/png;base64,{ENCODED}"


def load(base: Path, data: Path, *rows: Any, media_root: Path | None = None) -> tuple[Dataset, Any]:
    path = data / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = identify(str(base))
    assert found.modality is not None
    reader = found.modality.reader(found.checkpoint, lambda line: None)
    source = Source(name="rows", files=(path,), media_root=media_root)
    made = dataset([source], found.checkpoint, found.chat_format(), 512, reader=reader)
    return made, reader


def test_one_picture_in_every_form(seeing: Path, data: Path) -> None:
    root = data.parent / "pictures"
    root.mkdir()
    (root / "other.png").write_bytes(PNG)
    parts = [
        {"type": "image", "image": "good.png"},
        {"type": "image", "image": "./good.png", "cache_control": {"type": "ephemeral"}},
        {"type": "image", "image": URL},
        {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": "good.png"}},
        {"type": "image", "image": {"bytes": ENCODED, "path": None}},
        {"type": "image", "image": {"bytes": None, "path": "good.png"}},
        {"type": "image", "base64": ENCODED},
        {"type": "image", "image": f"{root}/other.png"},
        {"type": "image", "image": f"file://{root}/other.png"},
        {"type": "image_url", "image_url": {"url": f"file://localhost{root}/other.png"}},
        {"type": "image", "image": "other.png"},
    ]
    made, _ = load(seeing, data, *(conversation(p, QUESTION) for p in parts), media_root=root)
    assert made.rows == len(parts)
    first = made.train[0]
    assert len(first.media) == 1
    assert all(list(one.ids) == list(first.ids) for one in made.train)
    assert all(list(one.labels) == list(first.labels) for one in made.train)
    assert {one.media[0].digest for one in made.train} == {first.media[0].digest}


def test_frames_through_a_row(seeing: Path, data: Path) -> None:
    from PIL import Image

    for number, pixels in enumerate(frames(3, 64, 48)):
        Image.fromarray(pixels).save(data / f"f{number}.png")
    names = ["f0.png", "f1.png", "f2.png"]
    made, reader = load(
        seeing,
        data,
        conversation({"type": "video", "video": names, "fps": 2}, QUESTION),
        conversation({"type": "video", "video": [f"./{n}" for n in names], "fps": 2}, QUESTION),
        conversation({"type": "video_url", "video_url": names, "sample_fps": "2"}, QUESTION),
    )
    one, two, three = (example.media[0] for example in made.train)
    assert one.timestamps == two.timestamps == three.timestamps == (0.25, 1.0)
    assert one.digest == two.digest == three.digest
    assert reader.batch([one], torch.arange(one.tokens)).values.shape[0] == one.units
    assert made.summary()["media_keys"] == {"video": ["fps", "sample_fps"]}


def test_a_video_url(seeing: Path, data: Path) -> None:
    film = saved(picture("RGB", 40, 30), "GIF", save_all=True, append_images=[
        picture("RGB", 40, 30, 1)])  # fmt: skip
    (data / "a.gif").write_bytes(film)
    url = f"data:image/gif;base64,{base64.b64encode(film).decode()}"
    made, _ = load(
        seeing,
        data,
        conversation({"type": "video", "video": "a.gif"}, QUESTION),
        conversation({"type": "video_url", "video_url": {"url": url}, "fps": 2}, QUESTION),
        conversation({"type": "video_url", "video_url": "a.gif"}, QUESTION),
    )
    assert len({tuple(example.ids) for example in made.train}) == 1


def test_evicted_values_are_made_again_of_their_rows(seeing: Path, data: Path) -> None:
    """Of data URLs and bytes, and refused by file and line once the row has changed."""
    from qcore.errors import InputError

    rows = [
        conversation({"type": "image_url", "image_url": {"url": URL}}, QUESTION),
        conversation({"type": "video", "video": [URL, {"bytes": ENCODED}]}, QUESTION),
    ]
    made, reader = load(seeing, data, *rows)
    media = [example.media[0] for example in made.train]
    values = reader.batch(media, torch.arange(1)).values
    cache = data.parent / "cache/qcore/media"
    for entry in cache.glob("*.media"):
        entry.unlink()
    assert torch.equal(reader.batch(media, torch.arange(1)).values, values)
    for entry in cache.glob("*.media"):
        entry.unlink()
    (data / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n{}\n")
    reader.batch(media[:1], torch.arange(1))
    with pytest.raises(InputError, match="changed after its row was read") as caught:
        reader.batch(media, torch.arange(1))
    assert caught.value.code == "QC-MEDIA-008"
    assert f"line 2 of {data}/rows.jsonl" in caught.value.message


def test_media_columns_through_the_converters(seeing: Path, data: Path) -> None:
    """What converters make of columns is the same medium, list of frames included."""
    said = [
        {"role": "user", "content": "<image>Which color?"},
        {"role": "assistant", "content": "r"},
    ]
    bare = [
        {"role": "user", "content": [{"type": "image"}, QUESTION]},
        {"role": "assistant", "content": "r"},
    ]
    film = [{"role": "user", "content": "<video>Which color?"}, said[1]]
    rows = [
        {"messages": said, "images": ["good.png"]},
        {"messages": said, "images": [{"bytes": ENCODED, "path": None}]},
        {"messages": bare, "images": [{"bytes": ENCODED, "path": "gone.png"}]},
        {"messages": bare, "images": [URL]},
        {"messages": film, "videos": [["good.png", URL]]},
        {"messages": film, "videos": [["./good.png", "good.png"]]},
    ]
    made, _ = load(seeing, data, *rows)
    assert len({tuple(example.ids) for example in made.train}) == 2
    digests = [example.media[0].digest for example in made.train]
    assert (len(set(digests[:4])), len(set(digests[4:]))) == (1, 1)


def test_an_image_in_a_text_part_is_not_lost(seeing: Path, data: Path) -> None:
    from qcore.errors import InputError

    with pytest.raises(InputError) as caught:
        load(seeing, data, conversation({**QUESTION, "image": "good.png"}))
    assert caught.value.field == "line 1, messages[0].content[0].image"
    assert "a separate part" in str(caught.value.fix)


CASES = ("one_bad_image", "vqa_absolute", "vqa_images_list", "vqa_openai", "vqa_trl")


@pytest.mark.parametrize("name", CASES)
def test_cases(shared: Path, seeing: Path, data: Path, name: str) -> None:
    """Rows of the shared cases: the right picture, and a bad one refused alone."""
    from qcore.errors import InputError

    folder = shared / "cases/data" / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    # The cases lie beside each other; `cases/NAME/a.png` of a row is relative to their parent.
    (data / "cases").mkdir()
    (data / "cases" / name).mkdir()
    for file in folder.glob("*.png"):
        for target in (data, data / "cases" / name):
            (target / file.name).write_bytes(file.read_bytes())
    if name == "one_bad_image":
        with pytest.raises(InputError) as caught:
            load(seeing, data, *rows)
        assert (caught.value.code, caught.value.field) == (
            "QC-VISION-028",
            "line 8, messages[0].content[0]",
        )
        rows.pop(7)
    made, _ = load(seeing, data, *rows)
    assert made.summary()["media"] == {"image": len(rows)}
    assert len({tuple(example.ids) for example in made.train}) == 1
