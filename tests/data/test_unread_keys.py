"""Media, marks and parts of a prompt in keys that no format reads: never left out in silence."""

from __future__ import annotations

from typing import Any

import pytest

from qcore.api.media import RowError
from qcore.data.formats import Formats

TALK = [{"role": "user", "content": "What color?"}, {"role": "assistant", "content": "Red."}]
PAIR = {"prompt": "What color?", "completion": "Red."}


@pytest.mark.parametrize("key", ["image", "images", "video", "picture", "photo", "img", "file"])
@pytest.mark.parametrize("value", ["red.png", "data:image/png;base64,AA", "a/b c.JPG"])
@pytest.mark.parametrize("row", [{"messages": TALK}, PAIR])
def test_a_file_of_media_in_a_column_is_refused(row: Any, key: str, value: str) -> None:
    """Without a plugin such a row would train on its text alone."""
    with pytest.raises(RowError) as caught:
        Formats().convert({**row, key: value})
    error = caught.value
    assert (error.code, error.at) == ("QC-DATA-009", key)
    assert f"ignore_columns: [{key}]" in str(error.fix)
    _, done = Formats().convert({**row, key: value}, ignore=[key])
    assert len(done["messages"]) == 2


@pytest.mark.parametrize("key", ["image", "images", "video", "audio"])
def test_a_column_that_is_named_like_media_is_refused(key: str) -> None:
    """A name without an ending, such as a key of a store."""
    with pytest.raises(RowError) as caught:
        Formats().convert({"messages": TALK, key: "0001f3"})
    assert caught.value.code == "QC-DATA-009"


def test_a_file_of_media_in_a_message_is_refused() -> None:
    turns = [{**TALK[0], "image": "red.png"}, TALK[1]]
    with pytest.raises(RowError) as caught:
        Formats().convert({"messages": turns})
    assert (caught.value.code, caught.value.at) == ("QC-DATA-009", "messages[0].image")


def test_a_column_under_another_name_is_refused_with_a_plugin() -> None:
    with pytest.raises(RowError) as caught:
        Formats(kinds=("image",)).convert({"messages": TALK, "picture": "red.png"})
    error = caught.value
    assert (error.code, error.at) == ("QC-DATA-009", "picture")
    assert "fields: {image: picture}" in str(error.fix)


@pytest.mark.parametrize(
    ("key", "value"),
    [("source", "web"), ("note", "See red.png, page 2. It is a\nphoto.png"), ("picture", ""),
     ("license", "cc-by"), ("image", None), ("page", "the file is cat.png")],
)  # fmt: skip
def test_metadata_passes(key: str, value: Any) -> None:
    _, done = Formats().convert({"messages": TALK, key: value})
    assert done == {"messages": TALK}


@pytest.mark.parametrize("key", ["ignore", "is_train", "no_loss", "skip_turn", "masked", "learned"])
@pytest.mark.parametrize("value", [True, False, 0, 1, 1.0])
def test_a_switch_of_a_message_that_may_mark_training_is_refused(key: str, value: Any) -> None:
    turns = [TALK[0], {**TALK[1], key: value}]
    with pytest.raises(RowError) as caught:
        Formats().convert({"messages": turns})
    assert (caught.value.code, caught.value.at) == ("QC-DATA-022", f"messages[1].{key}")


@pytest.mark.parametrize(("key", "value"), [("train_id", "a1"), ("losses", 0.53), ("edited", True)])
def test_other_keys_of_a_message_are_metadata(key: str, value: Any) -> None:
    _, done = Formats().convert({"messages": [TALK[0], {**TALK[1], key: value}]})
    assert done == {"messages": TALK}


@pytest.mark.parametrize("key", ["sys_prompt", "preamble", "background", "knowledge"])
def test_a_column_that_is_part_of_the_prompt_is_refused(key: str) -> None:
    with pytest.raises(RowError) as caught:
        Formats().convert({"messages": TALK, key: "The ball is red."})
    assert (caught.value.code, caught.value.at) == ("QC-DATA-024", key)


def test_two_reasonings_of_a_turn_are_refused() -> None:
    turns = [TALK[0], {**TALK[1], "thinking": "x", "reasoning": "y"}]
    with pytest.raises(RowError) as caught:
        Formats().convert({"messages": turns})
    assert (caught.value.code, caught.value.at) == ("QC-DATA-016", "messages[1]")
    assert caught.value.found == "thinking and reasoning"
