"""Durable writes and renames of single files, and the errors of the system calls.

This file decides how bytes become durable (complete writes, fsync of files and folders) and which
`WriteError` an ``OSError`` becomes. All modules of this package change the disk through single
``os.*`` calls, so that a test can make each of them fail. POSIX only, like the rest of qcore.

Codes: ``QC-WRITE-003`` the disk is full, ``-004`` input/output error, ``-005`` not permitted,
``-006`` any other failed write; ``QC-READ-001`` a file that cannot be read.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ..errors import InputError, WriteError
from .leftovers import ATTEMPTS, TRASH, delete, hidden, new_file, sweep

__all__ = [
    "CHUNK", "create", "delete", "drop_folders", "make_folders", "reading", "remove_tree",
    "rewrite", "sync_folder", "write_all", "write_error", "writing",
]  # fmt: skip

CHUNK: Final = 4 << 20  # bytes read and hashed at a time

_WRITE_CODES: Final = {
    errno.ENOSPC: ("QC-WRITE-003", "the disk is full", "free space or name another disk"),
    errno.EDQUOT: ("QC-WRITE-003", "the quota is used up", "free space or name another disk"),
    errno.EFBIG: (
        "QC-WRITE-003",
        "the file system does not allow a file of this size",
        "name another disk",
    ),
    errno.EIO: ("QC-WRITE-004", "the disk reports an input/output error", "name another disk"),
    errno.EACCES: ("QC-WRITE-005", "is not writable", "check its permissions"),
    errno.EPERM: ("QC-WRITE-005", "is not writable", "check its permissions"),
    errno.EROFS: ("QC-WRITE-005", "is on a read-only file system", "name another folder"),
}


_READ_FIXES: Final = {
    errno.ENOENT: "name a file that exists",
    errno.ENOTDIR: "name a file that exists",
    errno.EACCES: "check its permissions",
    errno.EISDIR: "name a file, not a folder",
}


def write_error(error: OSError, path: Path) -> WriteError:
    """Return the `WriteError` for a failed write.

    Args:
        error: the error of the system call.
        path: the file or folder to name in the message.
    """
    reason = error.strerror or type(error).__name__
    code, what, fix = _WRITE_CODES.get(
        error.errno or 0, ("QC-WRITE-006", f"cannot be written: {reason}", "name another path")
    )
    return WriteError(code, what, file=path, fix=fix)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an ``OSError`` inside the block to a `WriteError` that names ``path``.

    Raises:
        WriteError: ``QC-WRITE-003`` to ``-006``.
    """
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert an ``OSError`` inside the block to an `InputError` that names ``path``.

    Raises:
        InputError: ``QC-READ-001``.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        fix = _READ_FIXES.get(error.errno or 0, "check the disk, or name another file")
        raise InputError("QC-READ-001", f"cannot be read: {reason}", file=path, fix=fix) from error


def write_all(fd: int, data: memoryview) -> None:
    """Write every byte; one ``os.write`` may write less (at most 2 GiB, or on a full disk)."""
    while data:
        data = data[os.write(fd, data) :]


def create(path: Path) -> int:
    """Create a file and return its descriptor.

    Raises:
        FileExistsError: the path exists, also as a link.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def rewrite(path: Path, chunks: Iterable[bytes]) -> None:
    """Replace a file atomically; any number of processes may do so at the same time.

    Args:
        path: the file; it need not exist.
        chunks: the new content.

    Raises:
        WriteError: ``QC-WRITE-003`` to ``-006``; the file is unchanged.
    """
    sweep(path)
    with writing(path):
        fresh, fd = new_file(path)
        try:
            try:
                for chunk in chunks:
                    write_all(fd, memoryview(chunk))
                os.fsync(fd)
                os.replace(fresh, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(fresh)
                raise
        finally:
            os.close(fd)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Sync a folder, which makes the names inside it durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(path: Path) -> list[Path]:
    """Create a folder and its missing parents.

    Returns:
        The folders that were created, outermost first.
    """
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError):  # another run deleted a parent that it had created
            return _make_folders(path)
    return _make_folders(path)


def _make_folders(path: Path) -> list[Path]:
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    created: list[Path] = []
    try:
        for folder in reversed(missing):
            try:
                os.mkdir(folder)
            except FileExistsError:  # another process created it meanwhile
                if stat.S_ISDIR(os.stat(folder).st_mode):  # it may be deleted again
                    continue
                raise
            created.append(folder)
            sync_folder(folder.parent)
    except OSError:
        drop_folders(created)
        raise
    return created


def drop_folders(created: list[Path]) -> None:
    """Delete the folders that `make_folders` created, as far as they are empty."""
    for folder in reversed(created):
        try:
            os.rmdir(folder)
        except OSError:
            return


def remove_tree(path: Path | str) -> None:
    """Delete a folder; under its name it is either complete or gone at any time.

    Raises:
        WriteError: ``QC-WRITE-004`` to ``-006`` it cannot be renamed or deleted.
    """
    path = Path(path)
    trash = hidden(path, TRASH)
    with writing(path):
        try:
            os.rename(path, trash)
        except FileNotFoundError:
            return
        sync_folder(path.parent)
        delete(trash)
