"""Records of all containers: equal rows from each, in constant memory, with the file's digest."""

from __future__ import annotations

import csv
import datetime
import gzip
import hashlib
import io
import json
import random
import shlex
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from support.conversations import conversations

from qcore.api.media import RowError
from qcore.data.reading import read_records
from qcore.data.rejects import Rejects
from qcore.data.source_counts import SourceCount
from qcore.data.sources import columnar, json_array, streams
from qcore.data.sources.containers import records
from qcore.data.sources.file_kinds import file_kind
from qcore.data.sources.selection import choose
from qcore.data.sources.source import Record, Source
from qcore.errors import InputError

ROWS = [{"id": str(i), "messages": row["messages"]} for i, row in enumerate(conversations(40))]
PAIRS = [{"prompt": f'Qu\u00e9 {i},\n"{i}"?', "response": f"{i};\t'"} for i in range(30)]
TIME = datetime.datetime(2024, 5, 1)
LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")
BOM = b"\xef\xbb\xbf"


def read(path: Path) -> list[Record]:
    return list(records(Source(name=str(path), files=(path,))))


def values(path: Path) -> list[Any]:
    return [record.value for record in read(path)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def array(rows: list[Any], **options: Any) -> bytes:
    return json.dumps(rows, ensure_ascii=False, **options).encode()


def two_members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


def two_frames(data: bytes) -> bytes:
    half = len(data) // 2
    press = zstandard.ZstdCompressor(write_checksum=True).compress
    # RFC 8878, 3.1.2: a skippable frame carries bytes that are not content.
    return press(data[:half]) + b"\x50\x2a\x4d\x18\x04\0\0\0skip" + press(data[half:])


def table(separator: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["prompt", "response"], delimiter=separator)
    writer.writeheader()
    writer.writerows(PAIRS)
    return file.getvalue().encode()


def parquet(rows: list[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def ipc(rows: list[Any], make: Callable[..., Any], **options: Any) -> bytes:
    file, whole = io.BytesIO(), pa.Table.from_pylist(rows)
    with make(file, whole.schema, **options) as writer:
        writer.write_table(whole, max_chunksize=7)
    return file.getvalue()


TEXT = {
    "rows.jsonl": lines(ROWS),
    "crlf.jsonl": lines(ROWS).replace(b"\n", b"\r\n"),
    "mark.jsonl": BOM + lines(ROWS),
    "last.jsonl": lines(ROWS)[:-1],
    "lines.json": lines(ROWS),
    "rows.ndjson": lines(ROWS),
    "noname": lines(ROWS),
    "array.json": array(ROWS),
    "indented.json": b"\n" + array(ROWS, indent=2),
    "mark.json": BOM + array(ROWS),
    "compact.json": array(ROWS, separators=(",", ":")),
}
ALL = TEXT | {
    "rows.jsonl.gz": gzip.compress(TEXT["rows.jsonl"]),
    "members.jsonl.gz": two_members(TEXT["rows.jsonl"]),
    "padded.jsonl.gz": gzip.compress(TEXT["rows.jsonl"]) + b"\0" * 512,  # as tape and tar pad
    "array.json.gz": gzip.compress(TEXT["array.json"]),
    "rows.jsonl.zst": zstandard.ZstdCompressor().compress(TEXT["rows.jsonl"]),
    "frames.jsonl.zst": two_frames(TEXT["rows.jsonl"]),
    "array.json.zst": zstandard.ZstdCompressor(level=19).compress(TEXT["array.json"]),
}


@pytest.mark.parametrize("name", ALL)
def test_every_container_of_json_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, ALL[name])
    assert [(record.line, record.value) for record in read(path)] == list(enumerate(ROWS, 1))
    assert file_kind(path).note == ""


@pytest.mark.parametrize(("name", "separator"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_csv(name: str, separator: str, tmp_path: Path) -> None:
    data = table(separator)
    assert values(write(tmp_path / name, data)) == PAIRS
    assert values(write(tmp_path / name, BOM + data)) == PAIRS
    assert values(write(tmp_path / f"{name}.gz", gzip.compress(data))) == PAIRS


def test_a_cell_of_json_stays_a_string(tmp_path: Path) -> None:
    cell = json.dumps(ROWS[0]["messages"])
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["messages", "id"], [cell, "1"]])
    assert values(write(tmp_path / "a.csv", file.getvalue().encode())) == [
        {"messages": cell, "id": "1"}
    ]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.parquet", parquet(PAIRS)),
        ("groups.parquet", parquet(PAIRS, row_group_size=4, compression="zstd")),
        ("pages.parquet", parquet(PAIRS, data_page_size=64, use_dictionary=False)),
        ("rows.arrow", ipc(PAIRS, pa.ipc.new_file)),
        ("rows.feather", ipc(PAIRS, pa.ipc.new_file, options=LZ4)),
        ("stream.arrow", ipc(PAIRS, pa.ipc.new_stream)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_columns(name: str, data: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / name, data)
    assert [(record.line, record.value) for record in read(path)] == list(enumerate(PAIRS, 1))
    assert file_kind(path).note == ""


def test_values_of_columns_become_json(tmp_path: Path) -> None:
    import decimal

    day = datetime.date(2026, 1, 2)
    columns = {
        "json": pa.array(['{"a": [1, null]}', None], pa.json_()),
        "words": pa.array(["x", "y"]).dictionary_encode(),
        "map": pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        "date": pa.array([day, None]),
        "nested": pa.array([{"at": [datetime.datetime(2026, 1, 2, 3)]}, None]),
        "decimal": pa.array([decimal.Decimal("1.50"), None]),
        "image": pa.array([{"bytes": b"\x89P", "path": "a.png"}, None]),
        "large": pa.array(["x", None], pa.large_string()),
        "null": pa.nulls(2),
        "calls": pa.array([[{"x": 1}, {"y": 2}], []]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    first, second = values(tmp_path / "a.parquet")
    assert first == {
        "json": {"a": [1, None]},
        "words": "x",
        "map": {"a": 1},
        "date": "2026-01-02",
        "nested": {"at": ["2026-01-02T03:00:00"]},
        "decimal": "1.50",
        "image": {"bytes": b"\x89P", "path": "a.png"},
        "large": "x",
        "null": None,
        "calls": [{"x": 1, "y": None}, {"x": None, "y": 2}],
    }
    assert second["json"] is second["nested"] is second["image"] is None


@pytest.mark.parametrize(
    ("row", "field", "fields"),
    [
        ({"messages": [{"role": "user", "content": TIME}]}, "messages.content", {}),
        ({"messages": [{"tool_calls": [{"function": {"arguments": {"date": TIME}}}]}]},
         "messages.tool_calls.function.arguments.date", {}),
        ({"prompt": "a", "completion": TIME}, "completion", {}),
        ({"prompt": "a", "tools": [{"parameters": {"since": TIME}}]},
         "tools.parameters.since", {}),
        ({"dialog": [{"utterance": TIME}]}, "dialog.utterance",
         {"messages": "dialog", "content": "utterance"}),
        ({"prompt": datetime.time(8, 30)}, "prompt", {}),
        ({"said": TIME}, "said", {"prompt": "said"}),
    ],
)  # fmt: skip
def test_times_in_place_of_text_are_refused(
    row: Any, field: str, fields: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(InputError) as caught:
        list(records(Source(name="a", files=(path,), fields=fields)))
    assert (caught.value.code, caught.value.field) == ("QC-DATA-034", field)
    column = field.partition(".")[0]
    assert f"ignore_columns: [{column}]" in str(caught.value.fix)


def test_dates_and_times_of_metadata_pass(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    row = {
        "prompt": TIME.date(),
        "created": TIME,
        "metadata": {"value": TIME},
        "messages": [{"role": "user", "content": "a", "timestamp": TIME}],
    }
    pq.write_table(pa.Table.from_pylist([row]), path)
    at = "2024-05-01T00:00:00"
    assert values(path) == [{
        "prompt": "2024-05-01", "created": at, "metadata": {"value": at},
        "messages": [{"role": "user", "content": "a", "timestamp": at}],
    }]  # fmt: skip


def test_a_file_that_datasets_wrote(tmp_path: Path) -> None:
    """`save_to_disk` and `to_parquet`, with a column of the type Json."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [{"prompt": "a", "arguments": {"x": 1}}, {"prompt": "b", "arguments": [1, "y"]}]
    features = datasets.Features(prompt=datasets.Value("string"), arguments=datasets.Json())
    whole = datasets.Dataset.from_list(rows, features=features)
    whole.to_parquet(tmp_path / "a.parquet")
    whole.save_to_disk(tmp_path / "disk")
    assert values(tmp_path / "a.parquet") == rows
    assert values(tmp_path / "disk" / "data-00000-of-00001.arrow") == rows


def test_ignored_columns_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"prompt": ["a"], "score": [float("nan")], "took": pa.array([1], pa.duration("s"))}
    pq.write_table(pa.table(columns), path)
    source = Source(name="a", files=(path,), ignore_columns=("score", "took"))
    assert [record.value for record in records(source)] == [{"prompt": "a"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "array.json.gz", "frames.jsonl.zst"])
def test_the_digest_covers_the_bytes_on_disk(name: str, tmp_path: Path) -> None:
    paths = [write(tmp_path / name, ALL[name]), write(tmp_path / "b.parquet", parquet(PAIRS))]
    digest = hashlib.sha256()
    found = list(records(Source(name="both", files=tuple(paths)), digest))
    assert digest.hexdigest() == hashlib.sha256(ALL[name] + parquet(PAIRS)).hexdigest()
    assert [record.path for record in found] == [paths[0]] * len(ROWS) + [paths[1]] * len(PAIRS)


@pytest.mark.parametrize(
    ("name", "data", "note"),
    [
        ("a.jsonl", gzip.compress(lines(PAIRS)), "is gzip, although its name ends in .jsonl"),
        ("a.jsonl.gz", lines(PAIRS), "is not compressed, although its name ends in .jsonl.gz"),
        ("a.jsonl", array(PAIRS), "contains a JSON array, although its name ends in .jsonl"),
        ("a.csv", lines(PAIRS), "contains JSON lines, although its name ends in .csv"),
        ("a.json", parquet(PAIRS), "contains Parquet, although its name ends in .json"),
        ("a.parquet", lines(PAIRS), "contains JSON lines, although its name ends in .parquet"),
        ("a.jsonl.gz", zstandard.ZstdCompressor().compress(array(PAIRS)),
         "is zstd and contains a JSON array, although its name ends in .jsonl.gz"),
    ],
)  # fmt: skip
def test_the_content_decides(name: str, data: bytes, note: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, data)
    assert file_kind(path).note == note
    assert values(path) == PAIRS


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_an_array_in_blocks_of_any_size(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(block)
    rows = [
        {"a": "".join(rng.choices('"\\[]{},: \n\u00e9x', k=9)), "b": [[{}], i]} for i in range(60)
    ]
    monkeypatch.setattr(json_array, "_BLOCK", block)
    text = json.dumps(rows, indent=rng.choice((None, 1)), ensure_ascii=bool(block % 2))
    assert values(write(tmp_path / "a.json", b"[ " + text[1:].encode() + b" \n")) == rows


def test_rows_after_a_bad_one_are_read(tmp_path: Path) -> None:
    bad = b"{'a': 1}", b'{"a": 1, "a": 2}', b"3", b'{"a": "\xff"}', b""
    data = b"[" + b",\n".join([lines(PAIRS[:1]), *bad, lines(PAIRS[1:2])]) + b"]"
    found = values(write(tmp_path / "a.json", data))
    assert [found[0], found[-1]] == PAIRS[:2]
    assert [type(value) for value in found[1:-1]] == [RowError] * 5


def test_a_list_of_messages_is_not_mistaken_for_rows(tmp_path: Path) -> None:
    row = {"messages": [{"id": "m1", "role": "user", "content": "a"}], "metadata": [{"id": "x"}]}
    assert values(write(tmp_path / "a.jsonl", lines([row]))) == [row]
    row = {"conversations": [{"id": "1", "from": "human", "value": "a"}]}
    assert values(write(tmp_path / "a.json", lines([row]))) == [row]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(PAIRS).replace(b"}\n", b"}\n\n")),
        ("a.json.gz", gzip.compress(array(PAIRS))),
        ("a.csv", table(",")),
        ("a.parquet", parquet(PAIRS, row_group_size=4)),
        ("a.arrow", ipc(PAIRS, pa.ipc.new_file)),
        ("b.arrow", ipc(PAIRS, pa.ipc.new_stream)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_share_of_the_records(name: str, data: bytes, tmp_path: Path) -> None:
    """The same records of every container, and the digest of all bytes."""
    path = write(tmp_path / name, data)
    other = write(tmp_path / "rows.jsonl", lines(PAIRS))
    whole = [record.value for _ in range(2) for record in read(other)]
    for options in ({"count": 17}, {"weight": 0.25}, {"count": 60}, {"count": 5, "seed": 3}):
        source = Source(name="a", files=(path, other), **options)  # type: ignore[arg-type]
        digest = hashlib.sha256()
        chosen = choose(60, source, 8)
        found = list(records(source, digest, seed=8))
        assert [record.value for record in found] == [whole[index] for index in chosen]
        assert [record.path for record in found] == [(path, other)[index > 29] for index in chosen]
        assert digest.hexdigest() == hashlib.sha256(data + lines(PAIRS)).hexdigest()
    with pytest.raises(InputError) as caught:
        list(records(Source(name="a", files=(path, other), count=61)))
    assert caught.value.code == "QC-DATA-036"


def large(path: Path, name: str) -> Path:
    """About 16 MB of content, in one row group."""
    rng = random.Random(0)
    rows = [{"prompt": rng.randbytes(4000).hex(), "response": "y" * 8000} for _ in range(1000)]
    if name.endswith(".parquet"):
        return write(path, parquet(rows, use_dictionary=False, compression="none"))
    data = array(rows) if name == "a.json" else lines(rows)
    if name.endswith(".gz"):
        data = gzip.compress(data, 1)
    if name.endswith(".zst"):
        data = zstandard.ZstdCompressor().compress(data)
    return write(path, data)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_memory_is_constant(name: str, tmp_path: Path) -> None:
    path = large(tmp_path / name, name)
    before = pa.default_memory_pool().max_memory()
    tracemalloc.start()
    count = sum(1 for record in records(Source(name="a", files=(path,))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000
    assert peak < 10 << 20
    if name.endswith(".parquet"):
        assert pa.default_memory_pool().max_memory() <= max(before, 12 << 20)


def test_a_line_of_200_mb_is_refused_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        file.seek(200 << 20)
        file.write(b'"}\n' + lines(PAIRS[:1]))
    tracemalloc.start()
    bad, good = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(bad.value, RowError)
    assert "too long" in bad.value.what
    assert (good.line, good.value) == (2, PAIRS[0])
    assert peak < 48 << 20


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("rows.json", "rows-rows.jsonl"),
        ("rows.jsonl", "rows-rows.jsonl"),
        ("new.json", "new.jsonl"),
        ("it's.json", "it's.jsonl"),
        ("a b.jsonl.gz", "a b.jsonl"),
        ("b.jsonl.zst", "b.jsonl"),
    ],
)
@pytest.mark.parametrize("form", ["wrapped", "document"])
def test_the_command_of_a_fix_overwrites_nothing(
    name: str, fix: str, form: str, tmp_path: Path
) -> None:
    """`rows.jsonl` is a file of the user's: what the shell redirects to must be a new file."""
    folder = tmp_path / "in here"
    folder.mkdir()
    mine = write(folder / "rows.jsonl", lines(PAIRS[:1]))
    row = {"messages": [{"role": "user", "content": "q"}]}
    text = json.dumps({"data": [row]} if form == "wrapped" else row, indent=2).encode()
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix)
    path = write(folder / name, packed(text) if packed else text)
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.code == "QC-DATA-003"
    command, _, target = (caught.value.fix or "").rpartition(" > ")
    assert shlex.split(target) == [str(folder / fix)]
    assert not Path(shlex.split(target)[0]).exists()
    assert shlex.quote(str(path)) in command
    tool = {".gz": "gzip -dc ", ".zst": "zstd -dc "}.get(Path(name).suffix, "jq -c ")
    assert command.startswith(tool)
    if mine != path:
        assert values(mine) == PAIRS[:1]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_cut_file_of_columns_is_described_in_plain_words(kind: str, tmp_path: Path) -> None:
    table, path = pa.table({"prompt": ["a"] * 500, "response": ["b"] * 500}), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    write(path, path.read_bytes()[:300])
    with pytest.raises(InputError) as caught:
        read(path)
    assert caught.value.code == "QC-DATA-031"
    assert caught.value.found == "no footer at its end"
    assert caught.value.expected == f"a whole {kind.title()} file"


@pytest.mark.slow
def test_a_line_without_an_end_stops_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(lines(PAIRS[:1]) + b'{"prompt": "')
        file.truncate(3 << 30)  # sparse
    with pytest.raises(InputError) as caught:
        read(path)
    assert (caught.value.code, caught.value.field) == ("QC-DATA-031", "line 2")


@pytest.mark.parametrize(
    ("module", "name", "data"),
    [
        ("pyarrow", "a.parquet", b"PAR1"),
        ("pyarrow", "a.arrow", b"ARROW1"),
        ("zstandard", "a.jsonl.zst", b"\x28\xb5\x2f\xfd"),
    ],
)
def test_a_missing_package_is_named_with_the_extra(
    module: str, name: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError) as caught:
        read(write(tmp_path / name, data))
    assert caught.value.code == "QC-DATA-033"
    assert caught.value.fix == 'pip install "qcore-framework[data]"' == streams.INSTALL


def test_nothing_optional_is_imported_for_json(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl.gz", ALL["rows.jsonl.gz"])
    code = (
        "import sys, qcore.cli.main\n"
        "from qcore.data.sources.read import read_sources\n"
        "from qcore.data.sources.containers import records\n"
        "print(sum(1 for s in read_sources(sys.argv[1:]) for _ in records(s)))\n"
        "print(sorted({'pyarrow', 'datasets', 'zstandard', 'pandas'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{len(ROWS)}\n[]\n"


def test_only_the_modules_of_columns_import_pyarrow() -> None:
    home = Path(columnar.__file__).parent
    found = [path.name for path in home.rglob("*.py") if "import pyarrow" in path.read_text()]
    assert sorted(found) == ["column_values.py", "columnar.py"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.parquet", "r.arrow"])
def test_a_bad_row_is_named_by_its_place_in_the_file(tmp_path: Path, name: str) -> None:
    """Lines of a text file, elements of a JSON array, rows of a column format."""
    good = {"prompt": "a\n\nb", "completion": "c"}
    bad = {"prompt": "a", "completion": ""}
    path = tmp_path / name
    if name.endswith(".csv"):
        path.write_text('prompt,completion\n"a\n\nb",c\n\na,""\n')
    elif name.endswith(".json"):
        path.write_text(json.dumps([good, bad], indent=1))
    elif name.endswith(".jsonl"):
        path.write_text(f"{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    else:
        table = pa.Table.from_pylist([good, bad])
        if name.endswith(".parquet"):
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write(table)
    rejects, counts = Rejects(), list[SourceCount]()
    source = Source(name=name, files=(path,))

    first, second = read_records([source], counts)
    assert first.record.parse().value["completion"] == "c"
    rejects.add(second, RowError("QC-DATA-010", "is empty", at="completion"))
    places = {"r.jsonl": "line 3", "r.json": "element 2", "r.csv": "line 6"}
    place = places.get(name, "row 2")
    with pytest.raises(InputError) as caught:
        rejects.stop(counts)
    assert caught.value.field == f"{place}, completion"
    (entry,) = rejects.entries()
    assert entry["place"] == place
