"""Bytes that rows hold are read again from their row, found by their digest."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from qcore.api.media import RowError
from qcore.data.sources.row_bytes import RowBytes, row_bytes

DATA = [bytes([number]) * (100 + number) for number in range(200)]


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def rows() -> list[Any]:
    """The bytes of each number in another place of the row."""
    forms = (
        lambda data: {"messages": [{"content": [{"image": f"data:;base64,{encoded(data)}"}]}]},
        lambda data: {"images": [{"bytes": encoded(data), "path": None}], "id": 1},
        lambda data: {"messages": json.dumps([{"url": f"data:image/png;base64,{encoded(data)}"}])},
        lambda data: {"text": "{no json", "images": [encoded(b"x" * 90), encoded(data)]},
    )
    return [forms[number % len(forms)](data) for number, data in enumerate(DATA)]


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    # A byte order mark and a blank line: line numbers are those of the file.
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows()), "utf-8")
    for number in (0, 1, 2, 3, 121, 199):
        origin = row_bytes(path, 2 * number + 1)
        assert origin is not None
        again = pickle.loads(pickle.dumps(origin))
        assert again.read(sha(DATA[number])) == DATA[number]


@pytest.mark.parametrize("form", ["parquet", "arrow", "arrow_stream"])
def test_columns(tmp_path: Path, form: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / f"rows.{form}"
    table = pyarrow.table({"image": [{"bytes": data, "path": None} for data in DATA]})
    if form == "parquet":
        from pyarrow import parquet

        parquet.write_table(table, path, row_group_size=77)
    else:
        new = pyarrow.ipc.new_file if form == "arrow" else pyarrow.ipc.new_stream
        with new(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=33)
    for number in (0, 76, 77, 140, 199):
        assert RowBytes(path, number + 1).read(sha(DATA[number])) == DATA[number]
    with pytest.raises(RowError):
        RowBytes(path, 201).read(sha(DATA[0]))


def test_a_file_without_access_by_row(tmp_path: Path) -> None:
    packed, whole = tmp_path / "rows.jsonl.gz", tmp_path / "rows.json"
    packed.write_bytes(gzip.compress(b"{}"))
    whole.write_text("[{}]")
    assert row_bytes(packed, 1) is None
    assert row_bytes(whole, 1) is None


def test_a_row_that_changed_is_refused_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    origin = RowBytes(path, 3)
    assert origin.read(sha(DATA[2])) == DATA[2]
    for content in ('{"a": 1}\n' * 5, '{"a": 1}\n', "{\n{\n{\n", None):
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        with pytest.raises(RowError) as caught:
            origin.read(sha(DATA[2]))
        assert caught.value.code == "QC-MEDIA-008"
        assert f"line 3 of {path}" in str(caught.value.found)
    # Rows that moved are not searched for elsewhere.
    path.write_text("{}\n" + "".join(json.dumps(row) + "\n" for row in rows()))
    with pytest.raises(RowError):
        origin.read(sha(DATA[2]))
    assert RowBytes(path, 4).read(sha(DATA[2])) == DATA[2]
