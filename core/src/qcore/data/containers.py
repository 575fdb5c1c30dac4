"""The records of a source: JSON Lines, JSON arrays, CSV, Parquet and Arrow files.

This file decides how records are numbered and which faults end a file: a record that cannot be
read becomes a `RowError` and reading goes on; a file that is cut or damaged raises an error,
because nobody knows what it should have held, so that no policy may skip it. Memory is constant.
`qcore.data.file_kinds` decides what a file is, `qcore.data.formats` what a record means.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..api.media import RowError
from ..errors import InputError
from . import columnar, csv_rows
from .file_kinds import FileKind, damaged, file_kind
from .json_array import elements
from .jsonl import Hasher, parse, raw_lines, too_long
from .source import Record, Source
from .streams import Damaged, decompressed, opened

_BLOCK: Final = 1 << 20


def records(source: Source, digest: Hasher | None = None) -> Iterator[Record]:
    """Yield the records of all files of a source, in order.

    Args:
        source: which files.
        digest: updated with the bytes of the files as they lie on disk, in order.

    Raises:
        InputError: ``QC-DATA-001`` unreadable, ``-002`` a file without rows, ``-003`` an
            unsupported format, ``-004`` a line of CSV that is too long, ``-031`` a damaged or cut
            file, ``-032`` broken CSV, ``-033`` a package is missing, ``-034`` a column of a type
            that JSON does not have.
    """
    for path in source.files:
        kind = file_kind(path)
        number, found = 0, False
        try:
            for number, value in _values(path, kind, source, digest):
                found = True
                yield Record(source, path, number, value)
        except Damaged as error:
            what = kind.compression or kind.container
            raise damaged(path, number + 1, error, what) from None
        if not found:
            raise InputError(
                "QC-DATA-002",
                "has no rows",
                file=path,
                expected="one conversation a row",
                fix="name the file that holds the conversations",
            )


def _values(
    path: Path, kind: FileKind, source: Source, digest: Hasher | None
) -> Iterator[tuple[int, Any]]:
    """Number and value of each record, blank lines left out."""
    if kind.container in ("parquet", "arrow", "arrow_stream"):
        if digest is not None:
            _hash(path, digest)
        values = columnar.rows(path, kind.container, source.ignore_columns)
        yield from enumerate(values, 1)
        return
    with decompressed(path, kind.compression, digest) as file:
        if kind.container in csv_rows.DELIMITERS:
            yield from enumerate(csv_rows.rows(file, path, kind.container), 1)
            return
        array = kind.container == "json"
        for number, raw in elements(file) if array else raw_lines(file, path):
            if raw is None or array or (raw := raw.strip(b" \t\r\n")):
                yield number, _value(raw)


def _value(raw: bytes | None) -> dict[str, Any] | RowError:
    if raw is None:
        return too_long()
    try:
        value = parse(raw)
    except RowError as bad:
        return bad
    if not isinstance(value, dict):
        return RowError(
            "QC-DATA-005",
            "is not an object",
            found=raw[:40].decode("utf-8", "replace"),
            expected='{"messages": [...]}',
            fix="write each conversation as one JSON object",
        )
    return value


def _hash(path: Path, digest: Hasher) -> None:
    with opened(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
