"""Hidden names beside a target, while it is written, replaced or deleted, and what a kill leaves.

This file decides these names (``.NAME.partial-*``, ``.NAME.old-*``, ``.NAME.trash-*``), that their
owner holds a kernel lock on them while it lives, and which of them a later run deletes. A sweep can
lock a folder between its creation and the lock of its owner. The owner notices that, because then
it either fails to lock the folder or holds one that has lost its name, and creates another: nothing
has been written into it yet. On a file system without locks nothing is swept.

`qcore.io.artifact` and `qcore.io.atomic` decide what is written under these names.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

PARTIAL, OLD, TRASH = "partial", "old", "trash"
MANIFEST: Final = "MANIFEST.json"  #: of an artifact
_TOKEN: Final = r"[0-9a-f]{16}"
_KINDS: Final = rf"(?P<kind>{PARTIAL}|{OLD}|{TRASH})"
_ANY: Final = re.compile(rf"\.(?P<stem>.+)\.{_KINDS}-{_TOKEN}")
ATTEMPTS: Final = 20  #: at what another process may undo at the same moment
_ALL: Final = re.compile(".+")
_LONGEST: Final = 180  # bytes of a stem: file systems allow 255 bytes in a name
_BUSY: Final = frozenset((errno.EWOULDBLOCK, errno.EACCES))


def hidden(target: Path, kind: str) -> Path:
    """Return a new hidden name beside a target.

    Args:
        target: a file or a folder; it need not exist.
        kind: `PARTIAL`, `OLD` or `TRASH`.
    """
    return target.with_name(f".{_stem(target.name)}.{kind}-{secrets.token_hex(8)}")


def _stem(name: str) -> str:
    """A target's name, shortened to a prefix and a digest if it is long."""
    data = name.encode(errors="surrogateescape")
    if len(data) <= _LONGEST:
        return name
    return f"{data[:100].decode(errors='ignore')}~{hashlib.sha256(data).hexdigest()[:16]}"


def new_folder(target: Path) -> tuple[Path, int]:
    """Create a locked partial folder beside a target.

    Returns:
        The folder, and the descriptor that holds its lock.

    Raises:
        OSError: the folder cannot be created.
    """

    def create(path: Path) -> int:
        os.mkdir(path)
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            with suppress(OSError):
                os.rmdir(path)
            raise

    return _created(target, create)


def new_file(target: Path) -> tuple[Path, int]:
    """Create a locked partial file beside a target.

    Returns:
        The file, and its descriptor for writing, which holds its lock.

    Raises:
        OSError: the file cannot be created.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return _created(target, lambda path: os.open(path, flags, 0o666))


def _created(target: Path, create: Callable[[Path], int]) -> tuple[Path, int]:
    missing: FileNotFoundError | None = None
    for _ in range(ATTEMPTS):
        path = hidden(target, PARTIAL)
        try:
            fd = create(path)
        except FileNotFoundError as error:  # swept after it was created, or no such parent
            missing = error
            continue
        if _owns(path, fd):
            return path, fd
        os.close(fd)
    raise missing or OSError(errno.EAGAIN, "is swept again and again", str(target))


def _owns(path: Path, fd: int) -> bool:
    """Lock a name that was just created; ``False``: a sweep has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _BUSY  # else no locks here, and then no sweep either
    return names(path, fd)


def names(path: Path, fd: int) -> bool:
    """Whether a path still names an open file or folder.

    Args:
        path: the path.
        fd: an open descriptor.
    """
    try:
        named = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    ours = os.fstat(fd)
    return (named.st_ino, named.st_dev) == (ours.st_ino, ours.st_dev)


def sweep(target: Path) -> None:
    """Delete what killed runs left beside a target, and what replaced it.

    Names that a living process has locked stay. An old artifact stays as long as the target is not
    an artifact again.

    Args:
        target: a file or a folder; it need not exist.
    """
    _sweep(target.parent, re.compile(re.escape(_stem(target.name))), target)


def sweep_inside(folder: Path, targets: re.Pattern[str] = _ALL) -> None:
    """Delete what killed runs left inside a folder, as `sweep` does for one target.

    Args:
        folder: only qcore writes targets of these names to it.
        targets: matches the names of the targets.
    """
    _sweep(folder, targets)


def _sweep(folder: Path, targets: re.Pattern[str], target: Path | None = None) -> None:
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            match = _ANY.fullmatch(entry.name)
            if match is None or entry.is_symlink() or not targets.fullmatch(match["stem"]):
                continue
            replaced = target or folder / match["stem"]
            if match["kind"] == OLD and not (replaced / MANIFEST).is_file():
                continue
            with suppress(OSError):
                _delete_unless_locked(Path(entry.path))


def _delete_unless_locked(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        delete(path)
    finally:
        os.close(fd)


def delete(path: Path) -> None:
    """Delete a tree without following links.

    It continues after a failure, to free as much space as possible, and raises the first error at
    the end. What another process deletes meanwhile counts as deleted.
    """
    failed: OSError | None = None
    with suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        for name in os.listdir(path):
            try:
                delete(path / name)
            except OSError as error:
                failed = failed or error
        if failed is None:
            os.rmdir(path)
    if failed is not None:
        raise failed
