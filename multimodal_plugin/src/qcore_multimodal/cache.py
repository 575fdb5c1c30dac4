"""On-disk cache of processed pixels, in the user's cache folder, shared by runs and epochs.

This file decides where entries lie (``$XDG_CACHE_HOME/qcore/media``), how an entry is written
(atomically), when it is valid (its length and its checksums match), and which entries are evicted
when the folder is full (the least recently used). `reader` decides what an entry holds. Any number
of processes may share the folder. A missing or damaged entry counts as absent: the reader processes
the media again and reports it. A folder that cannot be written is an error, because every epoch
would decode everything again.

``QCORE_MEDIA_CACHE_GB`` limits the folder; the default is 20.

- ``QC-VISION-040`` the variable is not a valid size.
- ``QC-VISION-041`` the cache folder cannot be determined.
- ``QC-VISION-044`` the pixels of one image or video exceed the limit.
- ``QC-WRITE-003`` to ``-006`` an entry cannot be written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import struct
import tempfile
import threading
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
_HEAD: Final = struct.Struct("<8sIIQI")  # magic; header length, checksum; values' length, checksum
_MAX_HEADER: Final = 1 << 20  # bytes of a header; a valid one has a few hundred
_STALE: Final = 60.0  # seconds after which the process that created a temporary file has locked it
_RESCAN: Final = 64  # writes between scans of the folder: other processes write too
_FILL: Final = 0.9  # share of the limit kept when evicting, so that not every write evicts


class Cache:
    """A folder of processed pixels, keyed by digest.

    Attributes:
        folder: the cache folder.
        bound: limit in bytes.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder = folder
        self.bound = bound
        self._bytes = 0
        self._guard = threading.Lock()  # of the counts: threads write at once
        self._puts = _RESCAN  # so that the first write scans the folder

    @classmethod
    def of_user(cls) -> Cache:
        """The cache in the user's cache folder, as configured by environment variables.

        Raises:
            UsageError: ``QC-VISION-040``, ``QC-VISION-041``.
        """
        try:
            folder = user_cache("media")
        except RuntimeError:
            raise UsageError(
                "QC-VISION-041", "no folder for the media cache: the home folder is unknown",
                field="XDG_CACHE_HOME", expected="an absolute path",
                fix="set XDG_CACHE_HOME to a folder that can be written",
            ) from None  # fmt: skip
        return cls(folder, _size_limit(os.environ.get(SIZE_VARIABLE)))

    def metadata(self, digest: str) -> dict[str, Any] | None:
        """The metadata of an entry, or ``None`` if there is no complete entry; reads no values."""
        try:
            with self._path(digest).open("rb") as file:
                metadata, length, _ = _read_header(file.read(_HEAD.size), file)
                complete = file.tell() + length == os.fstat(file.fileno()).st_size
        except (OSError, ValueError):
            return None
        return metadata if complete else None

    def values(self, digest: str) -> NDArray[np.uint8] | None:
        """The values of an entry, flat; ``None`` if the entry is missing or damaged."""
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
            os.utime(path)  # marks the entry as recently used
        return values

    def put(self, digest: str, metadata: Mapping[str, Any], values: NDArray[np.uint8]) -> None:
        """Write an entry atomically.

        Raises:
            RowError: ``QC-VISION-044`` the entry exceeds the limit of the folder.
            WriteError: ``QC-WRITE-003`` to ``-006``.
        """
        text = json.dumps(metadata, allow_nan=False).encode()
        flat = np.ascontiguousarray(values).reshape(-1)
        head = _HEAD.pack(_MAGIC, len(text), zlib.crc32(text), len(flat), zlib.crc32(flat.data))
        size = len(head) + len(text) + len(flat)
        if size > self.bound:
            raise RowError(
                "QC-VISION-044",
                "does not fit in the media cache after processing",
                found=f"{size} bytes",
                expected=f"at most {self.bound}",
                fix=f"raise {SIZE_VARIABLE}, or lower max_pixels of the part",
            )
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._guard:
                self._make_room(size)
                self._bytes += size
            fd, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
            try:
                with os.fdopen(fd, "wb") as file:
                    with contextlib.suppress(OSError):  # no locks here: then nothing is swept
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.write(head + text)
                    file.write(flat.data)
                    file.flush()
                    os.fsync(fd)
                    os.replace(name, self._path(digest))
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise

    def _make_room(self, size: int) -> None:
        """Evict least recently used entries until `size` bytes fit."""
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
                    _delete_unless_locked(entry.path)
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


def _delete_unless_locked(path: str) -> None:
    """Delete a temporary file of a process that has died."""
    with contextlib.suppress(OSError):  # it is locked, or gone, or there are no locks here
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(fd)


def _read_header(start: bytes, file: Any) -> tuple[dict[str, Any], int, int]:
    """Metadata of an entry, length and checksum of its values. Raises `ValueError`."""
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
            "QC-VISION-040", "invalid size of the media cache", field=SIZE_VARIABLE,
            found=repr(text), expected="a number of gigabytes above 0",
        )  # fmt: skip
    return int(value * 1e9)
