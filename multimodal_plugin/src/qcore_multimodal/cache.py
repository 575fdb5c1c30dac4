"""Values of media, kept in the user's cache between runs and between the epochs of one.

This file decides where they lie (``$XDG_CACHE_HOME/qcore/media``), how an entry is written (whole
or not at all), when it is believed (its length and its checksum are right) and which go when the
folder is full: those that were used longest ago. What an entry holds is `reader`'s. Any number of
processes may share the folder. An entry that is gone or damaged is none: the reader makes it
again, and says so. A folder that cannot be written is an error, for every epoch would decode
everything again.

``QCORE_MEDIA_CACHE_GB`` bounds the folder; 20 where it is not set.

- ``QC-VISION-040`` the variable is no size.
- ``QC-VISION-041`` there is no folder for it.
- ``QC-VISION-044`` a medium alone is larger than the folder may be.
- ``QC-WRITE-003`` to ``-006`` an entry cannot be written.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qcore.api import RowError, user_cache, writing
from qcore.errors import UsageError

SIZE_VARIABLE: Final = "QCORE_MEDIA_CACHE_GB"
_DEFAULT_GB: Final = 20.0
_MAGIC: Final = b"QCMEDIA1"
_HEAD: Final = struct.Struct("<8sIIQI")  # magic, head's length and sum, values' length and sum
_MAX_HEADER: Final = 1 << 20  # of a head; a real one has some hundred bytes
_STALE: Final = 3600.0  # seconds after which an unfinished entry was left by a dead process
_RESCAN: Final = 64  # entries after which the folder is looked at again, for others write too
_FILL: Final = 0.9  # of the bound, so that not every entry makes room anew


class Cache:
    """A folder of values by digest.

    Attributes:
        folder: where they lie.
        bound: bytes that it may hold.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder = folder
        self.bound = bound
        self._bytes = 0
        self._puts = _RESCAN  # so that the first entry looks

    @classmethod
    def of_user(cls) -> Cache:
        """The user's, as the environment says.

        Raises:
            UsageError: ``QC-VISION-040``, ``QC-VISION-041``.
        """
        try:
            folder = user_cache("media")
        except RuntimeError:
            raise UsageError(
                "QC-VISION-041", "values of media have no folder: there is no home folder",
                field="XDG_CACHE_HOME", expected="an absolute path", fix="set it",
            ) from None  # fmt: skip
        return cls(folder, _size_limit(os.environ.get(SIZE_VARIABLE)))

    def metadata(self, digest: str) -> dict[str, Any] | None:
        """What an entry says of its values, or ``None``; the values are not read."""
        try:
            with self._path(digest).open("rb") as file:
                metadata, length, _ = _read_header(file.read(_HEAD.size), file)
                complete = file.tell() + length == os.fstat(file.fileno()).st_size
        except (OSError, ValueError):
            return None
        return metadata if complete else None

    def values(self, digest: str) -> NDArray[np.uint8] | None:
        """The values of an entry, flat, or ``None`` where there is none or it is damaged."""
        path = self._path(digest)
        try:
            with path.open("rb") as file:
                _, length, total = _read_header(file.read(_HEAD.size), file)
                if length != os.fstat(file.fileno()).st_size - file.tell():
                    return None
                values = np.fromfile(file, np.uint8, length)
        except (OSError, ValueError):
            return None
        if len(values) != length or zlib.crc32(values.data) != total:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return values

    def put(self, digest: str, metadata: Mapping[str, Any], values: NDArray[np.uint8]) -> None:
        """Keep values, whole or not at all.

        Raises:
            RowError: ``QC-VISION-044`` larger than the folder may be.
            WriteError: ``QC-WRITE-003`` to ``-006``.
        """
        text = json.dumps(metadata, allow_nan=False).encode()
        flat = np.ascontiguousarray(values).reshape(-1)
        head = _HEAD.pack(_MAGIC, len(text), zlib.crc32(text), len(flat), zlib.crc32(flat.data))
        size = len(head) + len(text) + len(flat)
        if size > self.bound:
            raise RowError(
                "QC-VISION-044",
                "has more values than the cache of media may hold",
                found=f"{size} bytes",
                expected=f"at most {self.bound}",
                fix=f"set {SIZE_VARIABLE} higher, or max_pixels of the part lower",
            )
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            fd, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(head + text)
                    file.write(flat.data)
                os.replace(name, self._path(digest))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        self._bytes += size

    def _make_room(self, size: int) -> None:
        """Remove what was used longest ago until an entry of this size fits."""
        self._puts += 1
        if self._puts < _RESCAN and self._bytes + size <= self.bound:
            return
        self._puts = 0
        entries = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".media"):
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
                elif entry.name.endswith(".tmp") and time.time() - status.st_mtime > _STALE:
                    os.unlink(entry.path)
        self._bytes = sum(length for _, length, _ in entries)
        if self._bytes + size <= self.bound:
            return
        room = max(0, int(self.bound * _FILL) - size)
        for _, length, path in sorted(entries):
            if self._bytes <= room:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            self._bytes -= length

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.media"


def _read_header(start: bytes, file: Any) -> tuple[dict[str, Any], int, int]:
    """What an entry says, and length and sum of its values. Raises `ValueError`."""
    if len(start) != _HEAD.size:
        raise ValueError(start)
    magic, length, total, size, values_total = _HEAD.unpack(start)
    if magic != _MAGIC or length > _MAX_HEADER:
        raise ValueError(start)
    text = file.read(length)
    if len(text) != length or zlib.crc32(text) != total:
        raise ValueError(text)
    metadata: dict[str, Any] = json.loads(text)
    return metadata, size, values_total


def _size_limit(text: str | None) -> int:
    try:
        value = _DEFAULT_GB if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise UsageError(
            "QC-VISION-040", "is no size of the cache of media", field=SIZE_VARIABLE,
            found=repr(text), expected="a number of gigabytes above 0",
        )  # fmt: skip
    return int(value * 1e9)
