"""The bytes of a data file: regular files only, hashed as they are read, decompressed.

This file decides which files may be opened (regular ones: a pipe or a device would block or never
end) and how gzip and zstd are read in constant memory. Several members or frames are read as one.
A file that ends inside of one is cut, and refused. `qcore.data.sources.file_kinds` decides what a
file is.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from ...errors import InputError
from .jsonl import Hasher

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK: Final = 1 << 20
_ZSTD_INPUT: Final = 2048  # bytes; a block of 4 bytes may expand to 128 KiB
_ZSTD_WINDOW: Final = 1 << 27  # bytes; the largest that `zstd --ultra` writes
INSTALL: Final = 'pip install "qcore-framework[data]"'


class Damaged(Exception):
    """The bytes of a file cannot be read on: cut, corrupt, or followed by something else."""


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, unbuffered.

    Raises:
        InputError: ``QC-DATA-001`` it cannot be read or is not a regular file.
    """
    try:
        _check_type(path, os.stat(path).st_mode)
        # O_NONBLOCK: a pipe that has taken the file's place since must not block.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as file:
            _check_type(path, os.fstat(fd).st_mode)
            yield cast(BinaryIO, file)
    except gzip.BadGzipFile as error:  # an OSError, but not of the file system
        raise Damaged(str(error)) from error
    except OSError as error:
        raise unreadable(path, error.strerror or str(error)) from None


@contextmanager
def decompressed(path: Path, compression: str, digest: Hasher | None = None) -> Iterator[BinaryIO]:
    """Open a file and decompress it.

    Args:
        path: the file.
        compression: ``gzip``, ``zstd`` or empty.
        digest: updated with the bytes of the file as they lie on disk.

    Raises:
        InputError: ``QC-DATA-001``; ``QC-DATA-033`` `zstandard` is not installed.
        Damaged: the file is cut or corrupt.
    """
    with opened(path) as raw:
        file = cast(BinaryIO, io.BufferedReader(_Hashed(raw, digest), _BLOCK))
        if compression == "gzip":
            file = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        elif compression == "zstd":
            file = cast(BinaryIO, io.BufferedReader(_Zstd(file, path), _BLOCK))
        try:
            yield file
        except EOFError:
            raise Damaged("the compressed data end early") from None
        except zlib.error as error:
            raise Damaged(str(error)) from error


def unreadable(path: Path, reason: str, fix: str | None = None) -> InputError:
    """The error of a file that cannot be read."""
    return InputError(
        "QC-DATA-001",
        "cannot be read",
        file=path,
        found=reason,
        expected="a file of JSON lines, JSON, CSV, Parquet or Arrow",
        fix=fix or "name the file with the rows",
    )


def not_installed(path: object, package: str, what: str) -> InputError:
    """The error of a file that needs an optional package."""
    return InputError(
        "QC-DATA-033",
        f"is {what}, and the package {package} is not installed",
        file=path,
        fix=INSTALL,
    )


def _check_type(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise unreadable(path, kind, None if kind == "a folder" else "write the rows to a file")


class _Hashed(io.RawIOBase):
    """A raw file that updates a digest with what is read."""

    def __init__(self, file: BinaryIO, digest: Hasher | None) -> None:
        self._file = cast(io.RawIOBase, file)
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        count = self._file.readinto(buffer) or 0
        if self._digest is not None:
            self._digest.update(memoryview(buffer).cast("B")[:count])  # type: ignore[arg-type]
        return count


class _Zstd(io.RawIOBase):
    """Decompressed bytes of zstd frames.

    The stream reader of `zstandard` ends silently where a frame is cut, so that frames are
    decompressed one by one, a little input at a time.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise not_installed(path, "zstandard", "compressed with zstd") from None
        self._file = file
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: Any = None
        self._unused = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._ready:
            if not (chunk := self._unused or self._file.read(_ZSTD_INPUT)):
                if self._frame is not None:
                    raise EOFError
                return 0
            self._ready = memoryview(self._decompress(chunk))
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            data: bytes = self._frame.decompress(chunk)
        except self._error as error:
            raise Damaged(str(error)) from error
        self._unused = b""
        if self._frame.eof:
            self._unused, self._frame = self._frame.unused_data, None
        return data
