"""`convert`: canonical rows in a published folder, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcore.api.media import RowError
from qcore.data.convert import ROWS, convert
from qcore.data.formats import SCHEMA_VERSION, Formats, schema
from qcore.data.policies import Policies
from qcore.data.rejects import Rejects
from qcore.data.sources.source import Record, Source
from qcore.errors import InputError, PreflightError, WriteError
from qcore.io.artifact import read_manifest, verify

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}


def records(folder: Path, *values: Any, **policies: Any) -> list[Record]:
    path = folder / "in" / "rows.jsonl"
    source = Source(name="rows", files=(path,), **policies)
    return [Record(source, path, line, value) for line, value in enumerate(values, 1)]


def written(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / ROWS).read_text("utf-8").splitlines()]


def test_rows_of_several_formats_are_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    alpaca = {"instruction": "q", "output": "a ü \u2028", "source": "x"}
    report = convert(records(tmp_path, SHAREGPT, alpaca, {"messages": QA}), out, Formats())
    ended = [QA[0], {"role": "assistant", "content": "a ü \u2028"}]
    assert written(out) == [{"messages": QA}, {"messages": ended}, {"messages": QA}]
    assert report.as_json() == {
        "output": str(out), "rows": 3, "rejected": 0,
        "formats": {"sharegpt": 1, "alpaca": 1, "openai": 1},
        "ignored_columns": {"source": 1}, "findings": [], "media_root": None,
    }  # fmt: skip
    assert verify(out).ok
    manifest = read_manifest(out)
    assert (manifest.kind, manifest.meta["schema_version"]) == ("rows", SCHEMA_VERSION)
    assert manifest.meta["formats"] == report.as_json()["formats"]


def test_the_sources_policies_are_used(tmp_path: Path) -> None:
    rows = records(
        tmp_path, {"says": SHAREGPT["conversations"], "messages": "x", "tool": 1},
        fields={"conversations": "says"}, ignore_columns=("tool", "messages"), format="sharegpt",
    )  # fmt: skip
    convert(rows, tmp_path / "out", Formats())
    assert written(tmp_path / "out") == [{"messages": QA}]


def test_relative_media_become_absolute(tmp_path: Path) -> None:
    formats = Formats(kinds=("image", "video"))
    row = {"messages": [{"role": "user", "content": "<image><video>q"}, QA[1]],
           "images": ["b/a.png"], "videos": [["f0.png", "data:image/png;base64,AA=="]]}  # fmt: skip
    part = {"type": "image", "image": "/x/a.png", "min_pixels": 4}
    absolute = {"messages": [{"role": "user", "content": [part]}, QA[1]]}
    out = tmp_path / "out"
    report = convert(records(tmp_path, row, absolute), out, formats)
    folder = (tmp_path / "in").resolve()
    first, second = written(out)
    assert first["messages"][0]["content"] == [
        {"type": "image", "image": str(folder / "b/a.png")},
        {"type": "video", "video": [str(folder / "f0.png"), "data:image/png;base64,AA=="]},
        {"type": "text", "text": "q"},
    ]
    assert second == absolute
    assert report.media_root == folder


def test_relative_media_are_looked_up_in_the_media_root(tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (root / "a.png").write_bytes(b"x")
    content = [{"type": "image", "image": "a.png"}]
    rows = records(
        tmp_path, {"messages": [{"role": "user", "content": content}, QA[1]]}, media_root=root
    )
    report = convert(rows, tmp_path / "out", Formats(kinds=("image",)))
    (row,) = written(tmp_path / "out")
    assert row["messages"][0]["content"] == [{"type": "image", "image": str(root / "a.png")}]
    assert report.media_root == root
    content[0]["image"] = "../../a.png"
    with pytest.raises(InputError) as caught:
        convert(rows, tmp_path / "other", Formats(kinds=("image",)))
    assert caught.value.code == "QC-MEDIA-004"
    assert caught.value.field == "line 1, messages[0].content[0]"


def test_null_padding_is_dropped_as_in_training(tmp_path: Path) -> None:
    # Hand-written as `datasets` returns such rows: all calls have the keys of all functions.
    def schema(name: str, **types: Any) -> dict[str, Any]:
        properties = {key: {"type": kind} for key, kind in types.items()}
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    call = {"type": "function", "function": {"name": "weather",
            "arguments": {"city": "Lima", "room": None}}}  # fmt: skip
    empty = {"tool_calls": None, "name": None}
    row = {
        "messages": [
            {"role": "user", "content": "q", **empty},
            {"role": "assistant", "content": "", "name": None, "tool_calls": [call]},
            {"role": "tool", "content": "r", "tool_calls": None, "name": "weather"},
            {"role": "assistant", "content": "a", **empty},
        ],
        "tools": json.dumps([schema("weather", city="string", room=["string", "null"])]),
    }
    report = convert(records(tmp_path, row), tmp_path / "out", Formats())
    (made,) = written(tmp_path / "out")
    calls = made["messages"][1]["tool_calls"]
    assert calls[0]["function"]["arguments"] == {"city": "Lima"}
    assert [entry["code"] for entry in report.as_json()["findings"]] == ["QC-DATA-053"]


def test_what_repairs_refuse_is_refused(tmp_path: Path) -> None:
    orphan = [QA[0], {"role": "tool", "content": "r"}, QA[1]]
    with pytest.raises(InputError) as caught:
        convert(records(tmp_path, {"messages": orphan}), tmp_path / "out", Formats())
    assert caught.value.code == "QC-DATA-051"


def test_rows_of_an_untrained_source_say_so(tmp_path: Path) -> None:
    convert(records(tmp_path, SHAREGPT, train=False), tmp_path / "out", Formats())
    assert written(tmp_path / "out") == [{"messages": QA, "train": False}]


def test_nothing_is_written_if_a_row_is_refused(tmp_path: Path) -> None:
    bad = RowError("QC-DATA-004", "is not JSON")
    rows = records(
        tmp_path, SHAREGPT, {"text": "x"}, bad, {"messages": [{"role": "user", "content": None}]}
    )
    with pytest.raises(PreflightError) as caught:
        convert(rows, tmp_path / "out", Formats())
    assert [(error.code, error.field) for error in caught.value.errors] == [
        ("QC-DATA-021", "line 2, text"), ("QC-DATA-004", "line 3"),
        ("QC-DATA-006", "line 4, messages[0].content"),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_many_refused_rows_are_counted(tmp_path: Path) -> None:
    with pytest.raises(PreflightError) as caught:
        convert(records(tmp_path, *[{"text": "x"}] * 30), tmp_path / "out", Formats())
    assert len(caught.value.errors) == 21
    assert caught.value.errors[-1].code == "QC-DATA-014"
    assert "30 rows" in caught.value.errors[-1].what
    with pytest.raises(InputError) as one:
        convert(records(tmp_path, {"text": "x"}), tmp_path / "out", Formats())
    assert one.value.code == "QC-DATA-021"


def test_values_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    for value in (b"x", float("nan")):
        rows = records(tmp_path, {"messages": QA, "metadata": {"a": value}})
        with pytest.raises(InputError) as caught:
            convert(rows, tmp_path / "out", Formats())
        assert caught.value.code == "QC-DATA-006"


def test_refused_rows_can_be_left_out(tmp_path: Path) -> None:
    rows = records(
        tmp_path, {"text": "x"}, SHAREGPT, {"messages": [{"role": "user", "content": [3]}]}
    )
    rejects = Rejects(Policies(bad_rows="skip", bad_rows_limit=0.7))
    report = convert(rows, tmp_path / "out", Formats(), rejects=rejects)
    assert (report.rows, report.rejected) == (1, 2)
    assert [(e["line"], e["action"]) for e in rejects.entries()] == [(1, "skipped"), (3, "skipped")]
    assert written(tmp_path / "out") == [{"messages": QA}]
    with pytest.raises(InputError) as caught:
        convert(rows, tmp_path / "b", Formats(), rejects=Rejects(Policies(bad_rows="skip")))
    assert caught.value.code == "QC-DATA-047"
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"messages": [QA[0]]}, "QC-DATA-010"),
        ({"messages": [QA[0], {"role": "assistant", "content": ""}]}, "QC-DATA-010"),
        ({"messages": [{"role": "user", "content": "a\ud800"}, QA[1]]}, "QC-DATA-008"),
        ({"messages": QA, "tools": [{"type": "function", "function": {}}]}, "QC-DATA-007"),
    ],
)
def test_what_no_model_could_train_on_is_refused(tmp_path: Path, row: Any, code: str) -> None:
    with pytest.raises(InputError) as caught:
        convert(records(tmp_path, row), tmp_path / "out", Formats())
    assert caught.value.code == code


def test_the_target_is_checked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(records(tmp_path, SHAREGPT), out, Formats())
    with pytest.raises(WriteError, match="is not empty"):
        convert(records(tmp_path, SHAREGPT), out, Formats())
    convert(records(tmp_path, SHAREGPT, SHAREGPT), out, Formats(), overwrite=True)
    assert len(written(out)) == 2


def test_the_result_is_read_again_unchanged(tmp_path: Path) -> None:
    formats = Formats()
    odd = {"messages": [{"role": "user", "content": "a\u2028\u0085b"}, QA[1]]}
    convert(records(tmp_path, SHAREGPT, odd), tmp_path / "one", formats)
    convert(records(tmp_path, *written(tmp_path / "one")), tmp_path / "two", formats)
    assert (tmp_path / "one" / ROWS).read_bytes() == (tmp_path / "two" / ROWS).read_bytes()


def test_the_schema_has_the_version(tmp_path: Path) -> None:
    assert schema()["version"] == SCHEMA_VERSION
    assert schema()["$id"].endswith(f":{SCHEMA_VERSION}")
