"""The rows of Parquet and Arrow files, batch by batch.

This file decides how the files are read, and in batches of which size. A time where a conversation
has text is refused: Arrow infers times from strings, and the string cannot be restored. A date has
one spelling and stays text. Only a batch is in memory. `qcore.data.sources.column_values` makes
JSON values of a batch; `pyarrow` is imported in these two files, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from .column_times import check_times
from .column_values import BatchRow, Decoder, SharedBatch, damage, decoders_of
from .streams import Damaged, not_installed, opened

CONTAINERS: Final = ("parquet", "arrow", "arrow_stream")
# Those of a `qcore.data.reading.Chunk`, because a batch goes to one process as a whole.
_BATCH_BYTES: Final = 1 << 18
_BATCH_ROWS: Final = 64
_BUFFER: Final = 1 << 20  # bytes of a Parquet column chunk that are read at a time


def rows(
    path: Path, container: str, ignore: Collection[str] = (), texts: Collection[str] = ()
) -> Iterator[BatchRow]:
    """Yield the rows of a file, which are made objects where they are used.

    Args:
        path: the file.
        container: ``parquet``, ``arrow`` or ``arrow_stream``.
        ignore: columns that are not read.
        texts: further columns and keys of messages that are text, as a field mapping names them.

    Raises:
        InputError: ``QC-DATA-033`` `pyarrow` is not installed, ``-034`` a column that cannot be
            read, or that has times in place of text.
        Damaged: the file is cut or corrupt.
    """
    pa = _pyarrow(path, container)
    read = _parquet if container == "parquet" else _arrow
    decoders: dict[str, Decoder | None] | None = None
    try:
        for schema, batch in read(pa, path, container, ignore):
            if decoders is None:
                decoders = decoders_of(pa, schema, path, ignore)
                check_times(pa, schema, path, ignore, frozenset(texts))
            if batch is not None:
                shared = SharedBatch(batch.select(list(decoders)), path, decoders)
                yield from (BatchRow(shared, index) for index in range(batch.num_rows))
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names, not UTF-8
        raise damage(error) from error


def row(path: Path, container: str, number: int) -> dict[str, Any]:
    """One row by its number, from 1, with the values as Arrow has them; raises like `rows`.

    Raises:
        IndexError: the file has fewer rows.
    """
    pa, left = _pyarrow(path, container), number - 1
    read = _parquet_from if container == "parquet" else _arrow_batches
    try:
        for skipped, batches in read(pa, path, container, left):
            left -= skipped
            for batch in batches:
                if left < batch.num_rows:
                    one = batch.slice(left, 1)
                    one.validate(full=True)
                    found: dict[str, Any] = one.to_pylist()[0]
                    return found
                left -= batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damage(error) from error
    raise IndexError(f"the file has fewer than {number} rows")


def _parquet_from(
    pa: Any, path: Path, container: str, left: int
) -> Iterator[tuple[int, Iterator[Any]]]:
    """The row group that holds a row, and how many rows are before it."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
        before = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if left < before + count:
                batches = file.iter_batches(batch_size=64, row_groups=[group], use_threads=False)
                yield before, batches
                return
            before += count


def _arrow_batches(
    pa: Any, path: Path, container: str, left: int
) -> Iterator[tuple[int, Iterator[Any]]]:
    """All batches of a mapped file, which are not read until a row is taken."""
    with pa.memory_map(str(path)) as mapped:
        if container == "arrow_stream":
            yield 0, iter(pa.ipc.open_stream(mapped))
        else:
            file = pa.ipc.open_file(mapped)
            yield 0, map(file.get_batch, range(file.num_record_batches))


def count_rows(path: Path, container: str) -> int:
    """The number of rows of a file, from its metadata where it has them; raises like `rows`."""
    pa = _pyarrow(path, container)
    try:
        if container == "parquet":
            import pyarrow.parquet as pq

            return int(pq.read_metadata(path).num_rows)
        with pa.memory_map(str(path)) as mapped:
            if container == "arrow_stream":
                return sum(batch.num_rows for batch in pa.ipc.open_stream(mapped))
            file = pa.ipc.open_file(mapped)
            return sum(file.get_batch(at).num_rows for at in range(file.num_record_batches))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damage(error) from error


def _pyarrow(path: Path, container: str) -> Any:
    try:
        import pyarrow as pa
    except ImportError:
        what = "Parquet" if container == "parquet" else "Arrow"
        raise not_installed(path, "pyarrow", what) from None
    with opened(path):  # a folder, a pipe or a device is refused before Arrow opens it
        pass
    return pa


def _parquet(
    pa: Any, path: Path, container: str, ignore: Collection[str]
) -> Iterator[tuple[Any, Any]]:
    import pyarrow.parquet as pq

    # Without a buffer size, and with pre-buffering, a whole column chunk is read at once.
    with pq.ParquetFile(
        path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
    ) as file:
        schema, meta = file.schema_arrow, file.metadata
        yield schema, None
        size = sum(meta.row_group(group).total_byte_size for group in range(meta.num_row_groups))
        count = min(_BATCH_ROWS, max(1, _BATCH_BYTES * max(1, meta.num_rows) // max(1, size)))
        columns = [name for name in schema.names if name not in ignore]
        for batch in file.iter_batches(batch_size=count, columns=columns, use_threads=False):
            yield schema, batch


def _arrow(
    pa: Any, path: Path, container: str, ignore: Collection[str]
) -> Iterator[tuple[Any, Any]]:
    # Mapped, because writers may put all rows into one batch.
    with pa.memory_map(str(path)) as mapped:
        if container == "arrow":
            file = pa.ipc.open_file(mapped)
            batches = map(file.get_batch, range(file.num_record_batches))
        else:
            file = pa.ipc.open_stream(mapped)
            batches = iter(file)
        yield file.schema, None
        for batch in batches:
            for part in _validated(pa, batch):
                yield file.schema, part
        if container == "arrow_stream" and not _ended(mapped):
            raise Damaged("the stream has no end")


def _validated(pa: Any, batch: Any) -> Iterator[Any]:
    """Parts of a batch of which all offsets are in bounds; reading others would crash."""
    count = 1
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:  # up to the row at fault, which raises again
        pass
    else:
        per_row = max(1, batch.nbytes // max(1, batch.num_rows))
        count = min(_BATCH_ROWS, max(1, _BATCH_BYTES // per_row))
    for start in range(0, batch.num_rows, count):
        part = batch.slice(start, count)
        if count == 1:
            part.validate(full=True)
        yield part


def _ended(mapped: Any) -> bool:
    """Whether a stream ends with the marker that its writer adds when it is closed."""
    mapped.seek(max(0, mapped.size() - 8))
    return bool(mapped.read(8) == b"\xff\xff\xff\xff\0\0\0\0")
