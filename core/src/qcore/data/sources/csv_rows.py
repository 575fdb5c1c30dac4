"""The records of a CSV or TSV file: a header, then one object of strings per record.

This file decides what a valid file is: UTF-8, a header with unique names, quoting as in RFC 4180,
as many cells as the header in every record. Cells stay strings; a cell of JSON, such as a list of
messages, is parsed by the row format that reads the column.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from ...api.media import RowError
from ...errors import InputError, QcoreError
from .jsonl import MAX_LINE, raw_lines

DELIMITERS: Final = {"csv": ",", "tsv": "\t"}
_LONE: Final = range(0xDC80, 0xDD00)  # what `surrogateescape` makes of bytes that are not UTF-8


def rows(
    file: BinaryIO, path: Path, container: str
) -> Iterator[tuple[int, dict[str, str] | RowError]]:
    """Yield the line where a record begins, and the record, for all of a file.

    Args:
        file: the bytes.
        path: the file, for errors.
        container: ``csv`` or ``tsv``.

    Raises:
        InputError: ``QC-DATA-032`` no header, or broken quoting; what follows it is not certain.
    """
    if csv.field_size_limit() < MAX_LINE:  # of the process; the default is 128 KiB
        csv.field_size_limit(MAX_LINE)
    reader = csv.reader(_text(file, path), strict=True, delimiter=DELIMITERS[container])
    try:
        header = _header(next(reader, None), path, container)
        start = reader.line_num + 1
        for cells in reader:
            if cells:  # a blank line has none
                yield start, _row(header, cells)
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            "QC-DATA-032",
            f"is not valid {container.upper()}",
            file=path,
            field=f"line {reader.line_num}",
            found=error,
            expected='cells with quotes, separators or line breaks in "...", quotes doubled',
            fix="write the file with a CSV library",
        ) from None


def _text(file: BinaryIO, path: Path) -> Iterator[str]:
    for number, raw in raw_lines(file, path):
        if raw is None:
            raise InputError(
                "QC-DATA-004",
                "is too long",
                file=path,
                field=f"line {number}",
                expected=f"at most {MAX_LINE} bytes",
                fix="close the quotes of each cell",
            )
        yield raw.decode("utf-8", "surrogateescape")


def _header(cells: Sequence[str] | None, path: Path, container: str) -> list[str]:
    names = [cell.strip() for cell in cells or ()]
    if not any(names):
        raise _bad_header(path, "no header", "a first line with the names of the columns")
    if len(names) == 1 and container == "csv":
        for other, word in ((";", "semicolons"), ("\t", "tabs")):
            if other in names[0]:
                raise _bad_header(path, f"cells separated by {word}", "commas").replace(
                    fix="name the file .tsv" if other == "\t" else "save it with commas"
                )
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise _bad_header(path, f"the column {twice[0]!r} twice", "each name once")
    if "" in names:
        raise _bad_header(path, f"no name for column {names.index('') + 1}", "a name per column")
    for name in names:
        if _not_utf8(name):
            raise _bad_header(path, "bytes that are not UTF-8", "UTF-8").replace(
                fix="save the file as UTF-8"
            )
        if any(ord(character) < 32 for character in name):
            raise _bad_header(path, "a control character in a name", "names on one line")
    return names


def _bad_header(path: Path, found: str, expected: str) -> QcoreError:
    return InputError(
        "QC-DATA-032",
        "has no valid header",
        file=path,
        field="line 1",
        found=found,
        expected=expected,
        fix="write the names of the columns in the first line",
    )


def _row(header: Sequence[str], cells: Sequence[str]) -> dict[str, str] | RowError:
    if len(cells) != len(header):
        return RowError(
            "QC-DATA-032",
            "has another number of cells than the header",
            found=len(cells),
            expected=len(header),
            fix="quote cells that contain the separator",
        )
    row = dict(zip(header, cells, strict=True))
    for name, cell in row.items():
        if _not_utf8(cell):
            byte = next(ord(character) - 0xDC00 for character in cell if ord(character) in _LONE)
            return RowError(
                "QC-DATA-003",
                "is not UTF-8",
                at=name,
                found=f"0x{byte:02x}",
                fix="save the file as UTF-8",
            )
    return row


def _not_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
