"""Bytes that rows hold (data URLs, binary columns), read again from their row.

This file decides how bytes that a row holds are read a second time, when the processed values of
an image or video are no longer cached: the row is looked up by its number, and the bytes in it by
their SHA-256, so that the row format does not matter and a changed row is noticed. Nothing is
copied. A plain JSON Lines file is indexed by the offsets of its lines on first use; Parquet and
Arrow files have row groups or batches. Compressed files, JSON arrays and CSV have no such access:
for them there is no `RowBytes`, and the reader refuses a run whose values the cache cannot hold.

Codes: ``QC-MEDIA-008`` the bytes are no longer in the row.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from ...api.media import RowError
from ...errors import InputError
from . import columnar
from .file_kinds import COLUMN_SUFFIXES, file_kind
from .jsonl import parse
from .streams import Damaged

_BOM: Final = b"\xef\xbb\xbf"
_BY_ROW: Final = ("jsonl", *columnar.CONTAINERS)
_SHORTEST: Final = 16  # characters of base64; no image or video is smaller


@dataclass(frozen=True, slots=True)
class RowBytes:
    """The row that holds the bytes of a medium (`qcore.api.media.BytesSource`).

    Attributes:
        path: the data file.
        line: line of a JSON Lines file, else number of the record, from 1.
    """

    path: Path
    line: int

    def read(self, sha256: str) -> bytes:
        """The bytes with this digest.

        Raises:
            RowError: ``QC-MEDIA-008``.
        """
        try:
            value = _row(self.path, self.line)
        except (OSError, ValueError, LookupError, RowError, InputError, Damaged) as error:
            raise self._gone(str(error) or type(error).__name__) from None
        for data in _held(value):
            if hashlib.sha256(data).hexdigest() == sha256:
                return data
        raise self._gone("other content")

    def _gone(self, found: str) -> RowError:
        unit = "row" if self.path.suffix in COLUMN_SUFFIXES else "line"
        return RowError(
            "QC-MEDIA-008",
            "changed after its row was read",
            found=f"{unit} {self.line} of {self.path}: {found[:200]}",
            expected="the bytes that the row held",
            fix="do not modify data files during a run",
        )


def row_bytes(path: Path, line: int) -> RowBytes | None:
    """Where to read the bytes of a row again; ``None`` if the file has no access by row."""
    return RowBytes(path.absolute(), line) if _container(path) else None


@lru_cache(maxsize=1024)
def _container(path: Path) -> str:
    """The container of a file with access by row; empty for other files."""
    kind = file_kind(path)
    return "" if kind.compression or kind.container not in _BY_ROW else kind.container


def _row(path: Path, line: int) -> Any:
    container = _container(path)
    if container in columnar.CONTAINERS:
        return columnar.row(path, container, line)
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        starts = _line_starts(path, status.st_ino, status.st_mtime_ns, status.st_size)
        file.seek(starts[line - 1])
        return parse(file.readline().removeprefix(_BOM).strip(b" \t\r\n"))


@lru_cache(maxsize=64)
def _line_starts(path: Path, *version: int) -> array[int]:
    """Offset of every line; `version` identifies the content of the file."""
    starts, at = array("Q"), 0
    with path.open("rb") as file:
        for raw in file:
            starts.append(at)
            at += len(raw)
    return starts


def _held(value: Any) -> Iterator[bytes]:
    """All bytes that a row holds, as themselves, in data URLs, or in base64."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _held(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _held(inner)
    elif isinstance(value, str) and len(value) >= _SHORTEST:
        if value[:1] in ("{", "["):  # messages in a JSON string
            try:
                yield from _held(json.loads(value))
            except (ValueError, RecursionError):
                return
            return
        encoded = value.partition(",")[2] if value[:5].lower() == "data:" else value
        try:
            yield binascii.a2b_base64(encoded, strict_mode=True)
        except ValueError:
            return
