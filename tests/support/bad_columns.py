"""Bad Parquet and Arrow files."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from support.bad_file_kit import MIB, Bad, named


def _table(**columns: Any) -> Any:
    import pyarrow as pa

    return pa.table(columns or {"prompt": ["a", "b"], "response": ["c", "d"]})


def _parquet(table: Any = None, **options: Any) -> bytes:
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(_table() if table is None else table, file, **options)
    return file.getvalue()


def _of_type(type_: str, values: list[Any]) -> Any:
    import pyarrow as pa

    types = {
        "duration": pa.duration("s"),
        "json": pa.json_(),
        "map": pa.map_(pa.string(), pa.int64()),
        "int map": pa.map_(pa.int64(), pa.string()),
        "floats": pa.list_(pa.float64()),
        "interval": pa.month_day_nano_interval(),
        "uuid": pa.uuid(),
        "union": pa.dense_union([pa.field("a", pa.int64()), pa.field("b", pa.string())]),
        "twice": pa.struct([pa.field("a", pa.int64()), pa.field("a", pa.int64())]),
    }
    if type_ == "uuid":
        storage = pa.array(values, pa.binary(16))
        return pa.table(
            {"prompt": ["a"], "x": pa.ExtensionArray.from_storage(types["uuid"], storage)}
        )
    if type_ == "union":
        kinds, at = pa.array([0], pa.int8()), pa.array([0], pa.int32())
        column = pa.UnionArray.from_dense(kinds, at, [pa.array([1]), pa.array(["a"])], ["a", "b"])
        return pa.table({"prompt": ["a"], "x": column})
    if type_ == "twice":
        column = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
        return pa.table({"prompt": ["a"], "x": column})
    return pa.table({"prompt": ["a"] * len(values), "x": pa.array(values, types[type_])})


def _invalid_text() -> Any:
    import pyarrow as pa

    raw = pa.array([b"good", b"b\xffd"], pa.binary())
    text = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    return pa.table({"prompt": text, "response": ["a", "b"]})


def _twice() -> Any:
    import pyarrow as pa

    return pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])


def pq_(make: Callable[[], bytes], code: str, words: str, field: str = "row 1") -> Bad:
    return named("rows.parquet", make, code, words, field)


def _flipped() -> bytes:
    data = bytearray(_parquet(compression="snappy", use_dictionary=False))
    data[4:60] = b"\xff" * 56  # the page header of the first column
    return bytes(data)


def _changed() -> bytes:
    """A letter that has changed since the page's checksum was computed."""
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    data = _parquet(_table(prompt=["a good word", "another"]), write_statistics=False, **options)
    assert data.count(b"a good word") == 1
    return data.replace(b"a good word", b"a food word")


PARQUET = {
    "only the magic": pq_(lambda: b"PAR1", "QC-DATA-031", "is damaged or cut"),
    "cut in the middle": pq_(lambda: _parquet()[:200], "QC-DATA-031", "is damaged or cut"),
    "cut by a byte": pq_(lambda: _parquet()[:-1], "QC-DATA-031", "is damaged or cut"),
    "cut at the footer": pq_(lambda: _parquet()[:-40], "QC-DATA-031", "is damaged or cut"),
    "wrong footer length": pq_(lambda: _parquet()[:-8] + b"\xff\xff\xff\x7fPAR1", "QC-DATA-031",
        "is damaged or cut"),
    "noise in the footer": pq_(lambda: _parquet()[:-60] + b"\xff" * 52 + _parquet()[-8:],
        "QC-DATA-031", "is damaged or cut"),
    "noise in a page": pq_(_flipped, "QC-DATA-031", "is damaged or cut"),
    "no rows": pq_(lambda: _parquet(_table().slice(0, 0)), "QC-DATA-002", "no rows", ""),
    "checksum of a page": pq_(_changed, "QC-DATA-031", "CRC", "row 1"),
    "name not UTF-8": pq_(lambda: _parquet().replace(b"response", b"respo\xffse"), "QC-DATA-031",
        "is damaged", "row 1"),
    "no columns": pq_(lambda: _parquet(_table().select([])), "QC-DATA-034", "no columns", ""),
    "column twice": pq_(lambda: _parquet(_twice()), "QC-DATA-034", "two columns", "prompt"),
    "duration": pq_(lambda: _parquet(_of_type("duration", [1])), "QC-DATA-034", "duration", "x"),
    "map with numbers": pq_(lambda: _parquet(_of_type("int map", [[(1, "a")]])), "QC-DATA-034",
        "map", "x"),
    "NaN": pq_(lambda: _parquet(_table(x=[0.5, float("nan")])), "QC-DATA-004", "found nan",
        "row 2, x"),
    "infinity below": pq_(lambda: _parquet(_of_type("floats", [[0.5, float("inf")]])),
        "QC-DATA-004", "found inf", "row 1, x[1]"),
    "not UTF-8": pq_(lambda: _parquet(_invalid_text()), "QC-DATA-003", "0xff at byte 2",
        "row 2, prompt"),
    "bad JSON": pq_(lambda: _parquet(_of_type("json", ["{}", "{"])), "QC-DATA-004", "not JSON",
        "row 2, x"),
    "JSON with a duplicate key": pq_(lambda: _parquet(_of_type("json", ['{"a": 1, "a": 2}'])),
        "QC-DATA-004", "duplicate key", "row 1, x"),
    "map with a key twice": pq_(lambda: _parquet(_of_type("map", [[("a", 1), ("a", 2)]])),
        "QC-DATA-004", "cannot be read", "row 1, x"),
    "17 MiB": pq_(lambda: _parquet(_table(prompt=["a", "x" * (17 * MIB)])), "QC-DATA-004",
        "too long", "row 2"),
    "empty file": named("rows.parquet", b"", "QC-DATA-002", "no rows", ""),
}  # fmt: skip


def _ipc(table: Any = None, *, stream: bool = False, close: bool = True) -> bytes:
    import pyarrow as pa

    table, file = _table() if table is None else table, io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    writer = make(file, table.schema)
    writer.write_table(table)
    if close:
        writer.close()
    return file.getvalue()


def arrow(make: Callable[[], bytes], code: str, words: str, field: str = "row 1") -> Bad:
    return named("rows.arrow", make, code, words, field)


def _out_of_bounds() -> bytes:
    """Offsets of a text column, of which the middle one leads far out of the file."""
    data = _ipc(_table(prompt=["seven..", "thirteen....."]))
    before, after = (b"".join(n.to_bytes(4, "little") for n in (0, at, 20)) for at in (7, 2**30))
    assert data.count(before) == 1
    return data.replace(before, after)


ARROW = {
    "file: only the magic": arrow(lambda: b"ARROW1\0\0", "QC-DATA-031", "is damaged or cut"),
    "file: cut": arrow(lambda: _ipc()[:300], "QC-DATA-031", "is damaged or cut"),
    "file: cut by a byte": arrow(lambda: _ipc()[:-1], "QC-DATA-031", "is damaged or cut"),
    "file: noise": arrow(lambda: b"ARROW1\0\0" + b"\xff" * 200 + b"ARROW1", "QC-DATA-031",
        "is damaged or cut"),
    "file: no rows": arrow(lambda: _ipc(_table().slice(0, 0)), "QC-DATA-002", "no rows", ""),
    "file: no columns": arrow(lambda: _ipc(_table().select([])), "QC-DATA-034", "no columns", ""),
    "file: union": arrow(lambda: _ipc(_of_type("union", [])), "QC-DATA-034", "union", "x"),
    "file: duration": arrow(lambda: _ipc(_of_type("duration", [1])), "QC-DATA-034", "duration",
        "x"),
    "file: interval": arrow(lambda: _ipc(_of_type("interval", [(1, 2, 3)])), "QC-DATA-034",
        "interval", "x"),
    "file: UUID": arrow(lambda: _ipc(_of_type("uuid", [b"x" * 16])), "QC-DATA-034", "uuid", "x"),
    "file: field twice": arrow(lambda: _ipc(_of_type("twice", [])), "QC-DATA-034", "twice", "x"),
    "file: column twice": arrow(lambda: _ipc(_twice()), "QC-DATA-034", "two columns", "prompt"),
    "file: NaN": arrow(lambda: _ipc(_table(x=[float("nan")])), "QC-DATA-004", "found nan",
        "row 1, x"),
    "file: not UTF-8": arrow(lambda: _ipc(_invalid_text()), "QC-DATA-031", "UTF8", "row 2"),
    "file: offset out of bounds": arrow(_out_of_bounds, "QC-DATA-031", "is damaged"),
    "stream: cut": arrow(lambda: _ipc(stream=True)[:300], "QC-DATA-031", "is damaged or cut"),
    "stream: not closed": arrow(lambda: _ipc(stream=True, close=False), "QC-DATA-031", "no end",
        "row 3"),
    "stream: noise": arrow(lambda: b"\xff\xff\xff\xff" + b"\x10" * 60, "QC-DATA-031",
        "is damaged or cut"),
    "stream: no rows": arrow(lambda: _ipc(_table().slice(0, 0), stream=True), "QC-DATA-002",
        "no rows", ""),
}  # fmt: skip
