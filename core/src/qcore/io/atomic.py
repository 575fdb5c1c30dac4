"""Writing and renaming single files with fsync, and the errors of these system calls.

This file decides how bytes become durable (whole writes, fsync of files and of folders) and
which `WriteError` an ``OSError`` is. Every mutation by the modules of this room goes through
``os.*`` here or there, one call at a time, so that a test can make each of them fail. POSIX
only, as is the rest of qcore.

Codes: ``QC-WRITE-003`` disk full, ``-004`` input/output error, ``-005`` not permitted,
``-006`` any other failure to write; ``QC-READ-001`` a source that cannot be read.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ..errors import InputError, WriteError

CHUNK: Final = 4 << 20  # bytes read and hashed at a time

_WRITE_CODES: Final = {
    errno.ENOSPC: ("QC-WRITE-003", "the disk is full", "free space or name another disk"),
    errno.EDQUOT: ("QC-WRITE-003", "the quota is used up", "free space or name another disk"),
    errno.EFBIG: ("QC-WRITE-003", "the file system takes no file so large", None),
    errno.EIO: ("QC-WRITE-004", "the disk reports an input/output error", "name another disk"),
    errno.EACCES: ("QC-WRITE-005", "is not writable", "check its permissions"),
    errno.EPERM: ("QC-WRITE-005", "is not writable", "check its permissions"),
    errno.EROFS: ("QC-WRITE-005", "is on a read-only file system", "name another folder"),
}


def write_error(error: OSError, path: Path) -> WriteError:
    """The `WriteError` that this failure to write ``path`` is."""
    reason = error.strerror or type(error).__name__
    code, what, fix = _WRITE_CODES.get(
        error.errno or 0, ("QC-WRITE-006", f"cannot be written: {reason}", None)
    )
    return WriteError(code, what, file=path, fix=fix)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Any ``OSError`` inside becomes the `WriteError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Any ``OSError`` inside becomes the `InputError` that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError("QC-READ-001", f"cannot be read: {reason}", file=path) from error


def write_all(fd: int, data: memoryview) -> None:
    """Write every byte; ``os.write`` may take only some (a nearly full disk, 2 GiB at most)."""
    while data:
        data = data[os.write(fd, data) :]


def create(path: Path) -> int:
    """A descriptor of a new file; an existing one, link or not, is an error."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def rewrite(path: Path, chunks: Iterable[bytes]) -> None:
    """Put a file in place of what is there, whole or not at all.

    Raises:
        WriteError: ``QC-WRITE-003`` to ``-006``.
    """
    fresh = path.with_name(f"{path.name}.new")
    with writing(path):
        if fresh.exists():  # of a run that died here
            os.unlink(fresh)
        fd = create(fresh)
        try:
            for chunk in chunks:
                write_all(fd, memoryview(chunk))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(fresh, path)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(path: Path) -> list[Path]:
    """Create a folder and its missing parents; returns those created, outermost first."""
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            os.mkdir(folder)
            made.append(folder)
            sync_folder(folder.parent)
    except OSError:
        drop_folders(made)
        raise
    return made


def drop_folders(made: list[Path]) -> None:
    """Take back what `make_folders` created, as far as it is still empty."""
    for folder in reversed(made):
        try:
            os.rmdir(folder)
        except OSError:
            return


def delete(path: Path) -> None:
    """Delete a tree without following links; what cannot be deleted raises at the end.

    Goes on after a failure, so that as much space as possible is freed.
    """
    failed: OSError | None = None
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        names = os.listdir(path)
    except FileNotFoundError:
        return
    for name in names:
        try:
            delete(path / name)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
    os.rmdir(path)


def remove_tree(path: Path | str) -> None:
    """Delete a folder that is no longer needed; under its name it is whole or gone.

    Raises:
        WriteError: ``QC-WRITE-004`` to ``-006``.
    """
    path = Path(path)
    trash = path.with_name(f".{path.name[:100]}.trash-{secrets.token_hex(8)}")
    with writing(path):
        try:
            os.rename(path, trash)
        except FileNotFoundError:
            return
        sync_folder(path.parent)
        delete(trash)
