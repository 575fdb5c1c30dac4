"""The values of rows of Parquet and Arrow files: a batch of rows becomes JSON values.

This file decides how Arrow values become JSON values: numbers, strings, lists and objects as they
are, columns of type JSON parsed, dates and times in ISO 8601, decimals as strings, binary as
bytes (media columns hold them). Nulls stay, also those that Arrow adds to make the keys of all rows
equal; `qcore.data.repairs.repair` decides about them. A batch is converted where its rows are
used, which may be another process. `qcore.data.sources.columnar` reads the batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...api.media import RowError
from ...errors import InputError
from .column_times import is_list
from .jsonl import MAX_DEPTH, MAX_LINE, parse, too_long
from .streams import Damaged

Decoder = Callable[[Any, str], Any]


class SharedBatch:
    """A batch of rows, which become objects together on first use.

    Args:
        batch: the rows, an Arrow record batch.
        path: their file, for errors.
        decoders: by column; ``None``: made of the batch's schema.

    Attributes:
        size: bytes of a row, on average.
    """

    def __init__(
        self, batch: Any, path: Path, decoders: dict[str, Decoder | None] | None = None
    ) -> None:
        self._batch = batch
        self._path = path
        self._decoders = decoders
        self._values: list[Any] | None = None
        self.size: int = batch.nbytes // max(1, batch.num_rows)

    def value(self, index: int) -> Any:
        """A row as an object; a `RowError` if it cannot be read.

        Raises:
            Damaged: the batch is corrupt.
        """
        if self._values is None:
            import pyarrow as pa

            if self._decoders is None:
                self._decoders = decoders_of(pa, self._batch.schema, self._path, ())
            try:
                self._values = list(_rows(self._batch, self._decoders))
            except (pa.ArrowException, OSError) as error:
                raise damage(error) from error
        return self._values[index]

    def __reduce__(self) -> tuple[Any, ...]:
        # Arrow pickles all of the buffers that a slice lies in; a message has the slice alone.
        batch = self._batch
        return _received, (batch.schema.serialize(), batch.serialize(), self._path)


def damage(error: Exception) -> Damaged:
    """What pyarrow reports, in the words of this program where a cut file is the usual cause."""
    text = " ".join(str(error).split())
    cut = ("magic bytes not found in footer", "minimum file footer", "Not an Arrow file")
    if any(words in text for words in cut):
        return Damaged("no footer at its end")
    first = text.partition(". ")[0].rstrip(".")
    return Damaged(f"pyarrow reports: {first}")


def _received(schema: Any, batch: Any, path: Path) -> SharedBatch:
    import pyarrow as pa

    return SharedBatch(pa.ipc.read_record_batch(batch, pa.ipc.read_schema(schema)), path)


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row of a batch.

    Attributes:
        batch: the batch.
        index: position in the batch.
    """

    batch: SharedBatch
    index: int

    def value(self) -> Any:
        """The row as an object; a `RowError` if it cannot be read."""
        return self.batch.value(self.index)

    @property
    def size(self) -> int:
        """About how many bytes it has."""
        return self.batch.size


def _rows(batch: Any, decoders: dict[str, Decoder | None]) -> Iterator[Any]:
    whole = batch.nbytes <= MAX_LINE
    values: list[Any] | None = None
    if whole:
        try:
            values = batch.to_pylist(maps_as_pydicts="strict")
        except (ValueError, KeyError):  # one of them is not UTF-8 or has a duplicate key
            values = None
    for index in range(batch.num_rows):
        try:
            value = _one(batch.slice(index, 1)) if values is None else values[index]
            for name, decode in decoders.items():
                if decode is not None and value[name] is not None:
                    value[name] = decode(value[name], name)
        except RowError as bad:
            yield bad
        else:
            yield value


def _one(row: Any) -> Any:
    if row.nbytes > MAX_LINE:
        raise too_long()
    for name in row.schema.names:
        try:
            row.select([name]).to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            raise RowError(
                "QC-DATA-003",
                "is not UTF-8",
                at=name,
                found=f"0x{error.object[error.start]:02x} at byte {error.start + 1}",
                fix="write strings as UTF-8",
            ) from None
        except (ValueError, KeyError) as error:
            raise RowError(
                "QC-DATA-004",
                "cannot be read",
                at=name,
                found=" ".join(str(error).split())[:100],
                fix="write the value again",
            ) from None
    return row.to_pylist(maps_as_pydicts="strict")[0]


def decoders_of(
    pa: Any, schema: Any, path: Path, ignore: Collection[str]
) -> dict[str, Decoder | None]:
    """By column: what makes a JSON value of its values; ``None`` if they already are."""
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise _bad_column(path, twice[0], "two columns of that name", "each name once")
    found: dict[str, Decoder | None] = {}
    for column in schema:
        if column.name in ignore:
            continue
        try:
            found[column.name] = _decoder(pa, column.type, 1)
        except _UnsupportedType as error:
            raise _bad_column(path, column.name, f"type {error}", "a type that JSON has") from None
    if not found:
        raise _bad_column(path, "", "no columns", "columns with the conversations")
    return found


class _UnsupportedType(Exception):
    """A type that has no JSON value."""


def _decoder(pa: Any, type_: Any, depth: int) -> Decoder | None:
    kinds = pa.types
    if depth > MAX_DEPTH:
        raise _UnsupportedType(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(type_, pa.JsonType):
        return _json
    if kinds.is_dictionary(type_) or kinds.is_run_end_encoded(type_):
        return _decoder(pa, type_.value_type, depth)
    if kinds.is_struct(type_):
        fields = [type_.field(index) for index in range(type_.num_fields)]
        if len({field.name for field in fields}) < len(fields):
            raise _UnsupportedType(f"{str(type_)[:80]}, with a field twice")
        return _struct({field.name: _decoder(pa, field.type, depth + 1) for field in fields})
    if kinds.is_map(type_):
        if not (kinds.is_string(type_.key_type) or kinds.is_large_string(type_.key_type)):
            raise _UnsupportedType(f"{str(type_)[:80]}, with keys that are not strings")
        return _map(_decoder(pa, type_.item_type, depth + 1))
    if is_list(kinds, type_):
        return _list(_decoder(pa, type_.value_type, depth + 1))
    if kinds.is_floating(type_):
        return _finite
    if kinds.is_temporal(type_) and not (kinds.is_duration(type_) or kinds.is_interval(type_)):
        return _iso
    if kinds.is_decimal(type_):
        return _text
    plain = (
        kinds.is_null, kinds.is_boolean, kinds.is_integer, kinds.is_string, kinds.is_large_string,
        kinds.is_string_view, kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view,
        kinds.is_fixed_size_binary,
    )  # fmt: skip
    if any(is_kind(type_) for is_kind in plain):
        return None
    raise _UnsupportedType(str(type_)[:80])


def _struct(fields: dict[str, Decoder | None]) -> Decoder | None:
    some = {name: decode for name, decode in fields.items() if decode is not None}
    if not some:
        return None

    def decode_struct(value: Any, at: str) -> Any:
        for name, decode in some.items():
            if value[name] is not None:
                value[name] = decode(value[name], f"{at}.{name}")
        return value

    return decode_struct


def _list(decode: Decoder | None) -> Decoder | None:
    if decode is None:
        return None

    def decode_list(value: Any, at: str) -> Any:
        return [
            None if item is None else decode(item, f"{at}[{index}]")
            for index, item in enumerate(value)
        ]

    return decode_list


def _map(decode: Decoder | None) -> Decoder | None:
    if decode is None:
        return None

    def decode_map(value: Any, at: str) -> Any:
        return {
            key: None if item is None else decode(item, f"{at}.{key}")
            for key, item in value.items()
        }

    return decode_map


def _json(value: Any, at: str) -> Any:
    return parse(value, at=at)


def _finite(value: Any, at: str) -> Any:
    if not math.isfinite(value):
        raise RowError(
            "QC-DATA-004",
            "has a number that is not JSON",
            at=at,
            found=value,
            expected="a finite number or null",
            fix=f"correct it, or list the column {at.partition('.')[0]} under ignore_columns of a "
            "mix",
        )
    return value


def _iso(value: Any, at: str) -> str:
    return str(value.isoformat())


def _text(value: Any, at: str) -> str:
    return str(value)


def _bad_column(path: Path, name: str, found: str, expected: str) -> InputError:
    return InputError(
        "QC-DATA-034",
        "has a column that cannot be read",
        file=path,
        field=name or None,
        found=found,
        expected=expected,
        fix="list it under ignore_columns of a mix file, or write the file without it",
    )
