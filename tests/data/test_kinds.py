"""What each kind of wrong row is called, and that the fix of its message works when followed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcore.api.media import RowError
from qcore.data.formats import load_formats
from qcore.data.media.files import Finder, Reference
from qcore.data.sources.read import read_sources
from qcore.errors import InputError, QcoreError

DIALOG = {"dialog": [{"speaker": "patient", "utterance": "Hi, who is there?"},
                     {"speaker": "nurse", "utterance": "It is me, the nurse."}]}  # fmt: skip


def refused(row: Any, **options: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        load_formats().convert(row, **options)
    return caught.value


@pytest.mark.parametrize(
    ("row", "at"),
    [
        ({"prompt": "a", "completion": ""}, "completion"),
        ({"prompt": "a", "completion": []}, "completion"),
        ({"prompt": "", "completion": "b"}, "prompt"),
        ({"instruction": "a", "output": None}, "output"),
        ({"query": "a", "response": ""}, "response"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_known_key_that_is_empty_is_named(row: dict[str, Any], at: str) -> None:
    """Not: "has no keys of a known row format", which are all there."""
    bad = refused(row)
    assert "known row format" not in bad.what
    assert bad.at.startswith(at) or at in str(bad.found), (bad.at, bad.found)
    assert bad.code in ("QC-DATA-005", "QC-DATA-010")


def test_the_fixes_of_a_dialog_lead_to_its_messages() -> None:
    """Each fix is followed as it is written, until the row is read."""
    first = refused(DIALOG)
    assert "{messages: dialog}" in str(first.fix)
    second = refused(DIALOG, fields={"messages": "dialog"})
    assert "{role: speaker, content: utterance}" in str(second.fix)
    fields: dict[str, Any] = {"messages": "dialog", "role": "speaker", "content": "utterance"}
    third = refused(DIALOG, fields=fields)
    assert "roles: {assistant:" in str(third.fix)
    fields["roles"] = {"assistant": "nurse", "user": "patient"}
    _, row = load_formats().convert(DIALOG, fields=fields)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "forced", "meant"),
    [
        ({"instruction": "a", "output": "b"}, "sharegpt", "alpaca"),
        ({"messages": [{"role": "user", "content": "a"}]}, "trl", "openai"),
        ({"prompt": "a", "completion": "b"}, "alpaca", "trl"),
    ],
)
def test_a_format_that_was_named_by_mistake(row: Any, forced: str, meant: str) -> None:
    assert (
        refused(row, forced=forced).fix == f"leave the format out: the row has the keys of {meant}"
    )
    assert load_formats().convert(row)[0] == meant


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").touch()
    (folder / "tokenizer.json").write_text('{\n"added_tokens": [{"id": 1}]}')


def _model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").touch()
    (folder / "generation_config.json").write_text("{\n}")


@pytest.mark.parametrize(("make", "what"), [(_adapter, "an adapter"), (_model, "a model")])
def test_a_folder_of_weights_is_not_rows(
    make: Callable[[Path], None], what: str, tmp_path: Path
) -> None:
    """Once, not with a line and a command of jq for each of its JSON files."""
    make(tmp_path)
    with pytest.raises(InputError) as caught:
        read_sources([tmp_path])
    assert (caught.value.code, caught.value.what) == ("QC-DATA-030", f"is the folder of {what}")


def test_a_file_of_weights_is_not_utf_16(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(QcoreError) as caught:
        read_sources([path])
    assert "is safetensors weights" in caught.value.message


def test_a_picture_that_is_not_there_may_lie_below_another_folder(tmp_path: Path) -> None:
    """Rows of LLaVA name files relative to a folder of images, not to the data file."""
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "a.png").write_bytes(b"png")
    part = Reference(kind="image", at="x", given="a.png", options={})
    with pytest.raises(RowError) as caught:
        Finder(tmp_path).payload(part)
    assert caught.value.code == "QC-MEDIA-002"
    assert "--media-root" in str(caught.value.fix)
    found = Finder(tmp_path, tmp_path / "coco").payload(part)
    assert found.path == (tmp_path / "coco" / "a.png").resolve()
