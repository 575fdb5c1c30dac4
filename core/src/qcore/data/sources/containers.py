"""The records of a source: JSON Lines, JSON arrays, CSV, Parquet and Arrow files.

This file decides how records are numbered and which faults end a file: a record that cannot be
read becomes a `RowError` and reading goes on; a file that is cut or damaged raises an error,
because what it should have held is unknown, so that no policy may skip it. Memory is constant.
`qcore.data.sources.file_kinds` decides what a file is, `qcore.data.formats` what a record means.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...api.media import RowError
from ...errors import InputError
from ..tool_fields import kind
from . import columnar, csv_rows
from .column_values import BatchRow
from .file_kinds import FileKind, damaged, file_kind, unit_of
from .json_array import elements
from .jsonl import Hasher, parse, raw_lines, too_long
from .selection import choose
from .source import Record, Source
from .streams import Damaged, decompressed, opened

_BLOCK: Final = 1 << 20
_OTHER_SIZE: Final = 4096  # bytes of a record of unknown size
_COLUMNAR: Final = ("parquet", "arrow", "arrow_stream")


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record of a file before it is parsed; it can be pickled.

    Attributes:
        source: where it comes from.
        path: the file.
        line: line of a JSONL file, else the number of the record, from 1.
        raw: its JSON text; a parsed object; a row of a column format; a `RowError` if it cannot be
            read; ``None`` if it is too long.
        unit: what `line` counts; see `Record.unit`.
    """

    source: Source
    path: Path
    line: int
    raw: bytes | dict[str, Any] | BatchRow | RowError | None
    unit: str = "line"

    def __reduce__(self) -> tuple[type[RawRecord], tuple[Any, ...]]:
        """Pickle it by position, which takes a tenth of the time of a pickled dataclass."""
        return RawRecord, (self.source, self.path, self.line, self.raw, self.unit)

    def parse(self) -> Record:
        """The record with its JSON value.

        Raises:
            InputError: ``QC-DATA-031`` the file is damaged.
        """
        raw = self.raw
        if isinstance(raw, BatchRow):
            try:
                raw = raw.value()
            except Damaged as error:
                kind = file_kind(self.path).container
                raise damaged(self.path, self.line, error, kind, self.unit) from None
        return Record(self.source, self.path, self.line, _value(raw), self.unit)

    @property
    def size(self) -> int:
        """About how many bytes it has."""
        if isinstance(self.raw, bytes):
            return len(self.raw)
        return self.raw.size if isinstance(self.raw, BatchRow) else _OTHER_SIZE


def records(source: Source, digest: Hasher | None = None, *, seed: int = 0) -> Iterator[Record]:
    """Yield the records of all files of a source, parsed; see `raw_records`."""
    return (record.parse() for record in raw_records(source, digest, seed=seed))


def raw_records(
    source: Source, digest: Hasher | None = None, *, seed: int = 0
) -> Iterator[RawRecord]:
    """Yield the records of all files of a source, in order.

    If the source has a `weight` or `count`, only the records that `selection.choose` takes are
    yielded. Their number is counted first, in a pass of its own that parses nothing; bad records
    count, so that the choice does not depend on what is refused.

    Args:
        source: which files.
        digest: updated with the bytes of the files as they lie on disk, in order, whatever is
            chosen.
        seed: of the choice, unless the source has its own.

    Raises:
        InputError: ``QC-DATA-001`` unreadable, ``-002`` a file without rows, ``-003`` an
            unsupported format, ``-004`` a line of CSV that is too long, ``-031`` a damaged or cut
            file, ``-032`` broken CSV, ``-033`` a package is missing, ``-034`` a column of a type
            that JSON does not have, ``-036`` fewer rows than `count`.
    """
    every = source.weight is None and source.count is None
    chosen = iter(() if every else choose(count_records(source), source, seed))
    wanted, index = next(chosen, None), -1
    for path in source.files:
        unit = unit_of(file_kind(path).container)
        for number, raw in _raw_records(path, source, digest):
            index += 1
            if every or index == wanted:
                wanted = next(chosen, None)
                yield RawRecord(source, path, number, raw, unit)


def count_records(source: Source) -> int:
    """The number of records of all files, bad ones included; raises like `records`."""
    count = 0
    for path in source.files:
        container = file_kind(path).container
        if container in _COLUMNAR:
            try:
                count += columnar.count_rows(path, container)
            except Damaged as error:
                raise damaged(path, 1, error, container, "row") from None
        else:
            count += sum(1 for record in _raw_records(path, source, None))
    return count


def _raw_records(path: Path, source: Source, digest: Hasher | None) -> Iterator[tuple[int, Any]]:
    """Number and value of each record of a file; bytes are JSON, ``None`` is too long."""
    as_file = file_kind(path)
    number, found = 0, False
    try:
        for number, raw in _contents(path, as_file, source, digest):
            found = True
            yield number, raw
    except Damaged as error:
        what = as_file.compression or as_file.container
        unit = unit_of(as_file.container)
        raise damaged(path, number + 1, error, what, unit) from None
    if not found:
        raise InputError(
            "QC-DATA-002",
            "has no rows",
            file=path,
            expected="one conversation a row",
            fix="name the file that holds the conversations",
        )


def _contents(
    path: Path, as_file: FileKind, source: Source, digest: Hasher | None
) -> Iterator[tuple[int, Any]]:
    if as_file.container in _COLUMNAR:
        if digest is not None:
            _hash(path, digest)
        texts = _names(source.fields)
        yield from enumerate(
            columnar.rows(path, as_file.container, source.ignore_columns, texts), 1
        )
        return
    with decompressed(path, as_file.compression, digest) as file:
        if as_file.container in csv_rows.DELIMITERS:
            yield from csv_rows.rows(file, path, as_file.container)
            return
        array = as_file.container == "json"
        for number, raw in elements(file) if array else raw_lines(file, path):
            if raw is None or array or (raw := raw.strip(b" \t\r\n")):
                yield number, raw


def _names(fields: Mapping[str, Any]) -> set[str]:
    """Columns and keys that a field mapping names as part of a conversation."""
    names: set[str] = set()
    for key, value in fields.items():
        if isinstance(value, Mapping):
            names |= _names(value)
        elif isinstance(value, str) and key not in ("id", "metadata"):
            names.add(value.removeprefix("messages[]."))
    return names


def _value(raw: bytes | dict[str, Any] | RowError | None) -> dict[str, Any] | RowError:
    if raw is None:
        return too_long()
    if not isinstance(raw, bytes):
        return raw
    try:
        value = parse(raw)
    except RowError as bad:
        return bad
    if not isinstance(value, dict):
        return RowError(
            "QC-DATA-005",
            "is not an object",
            found=kind(value),
            expected='{"messages": [...]}',
            fix="write each conversation as one JSON object",
        )
    return value


def _hash(path: Path, digest: Hasher) -> None:
    with opened(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
