"""The lock of a run folder: one process at a time writes into it.

This file decides who may write into a run folder. Unlike an artifact (`io.artifact`) a run
folder grows while the run goes on, so it has no manifest; what must be complete inside it is
published there.

Codes: ``QC-WRITE-003`` to ``-006`` from `io.atomic`, ``-010`` the folder is in use.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self

from ..errors import WriteError
from .atomic import write_all, writing

LOCK: Final = ".qcore.lock"
_NO_LOCKS: Final = frozenset((errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL))


class Lock:
    """Exclusive use of a run folder, as a context manager.

    The kernel's lock decides, and it ends with the process, however that ends; the owner
    (pid, boot id, host) in the file is for the message, and decides where a file system has
    no locks: an owner of another boot, or whose process is gone, is stale.
    """

    def __init__(self, folder: Path | str, name: str = LOCK) -> None:
        self._path = Path(folder) / name
        self._fd = -1
        self._pid = 0

    def acquire(self) -> Self:
        """Take the lock; the folder must exist.

        Raises:
            WriteError: ``QC-WRITE-010`` when another run holds it.
        """
        with writing(self._path):
            while self._fd < 0:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(self._path, flags, 0o666)
                try:
                    if self._lock(fd) and self._still_named(fd):
                        self._fd, self._pid, fd = fd, os.getpid(), -1
                finally:
                    if fd >= 0:
                        os.close(fd)
            try:
                os.ftruncate(self._fd, 0)
                write_all(self._fd, memoryview(json.dumps(_owner()).encode()))
            except OSError:
                os.close(self._fd)
                self._fd = -1
                raise
        return self

    def release(self) -> None:
        """Give the lock back; does nothing where it is not held."""
        if self._fd < 0:
            return
        if self._pid == os.getpid():  # a forked child gives back nothing of its parent's
            with suppress(OSError):
                os.unlink(self._path)  # first the name, so that a waiter sees that it is gone
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _lock(self, fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                owner = _read_owner(fd)
                if owner is not None and _alive(owner):
                    raise self._held(owner) from error
                return True
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._held(_read_owner(fd)) from error
            raise
        return True

    def _still_named(self, fd: int) -> bool:
        """Whether the file that we locked is still the one under the name."""
        try:
            named = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        ours = os.fstat(fd)
        return (named.st_ino, named.st_dev) == (ours.st_ino, ours.st_dev)

    def _held(self, owner: Mapping[str, Any] | None) -> WriteError:
        who = "another run"
        if owner is not None:
            who = f"process {owner.get('pid')} on {owner.get('host')}"
        return WriteError(
            "QC-WRITE-010",
            f"is in use by {who}",
            file=self._path.parent,
            fix="wait for that run, or name another folder",
        )


def boot_id() -> str:
    """An id of the current boot of this machine; empty where the system has none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _owner() -> dict[str, Any]:
    return {"pid": os.getpid(), "boot_id": boot_id(), "host": socket.gethostname()}


def _read_owner(fd: int) -> dict[str, Any] | None:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) and type(owner.get("pid")) is int else None


def _alive(owner: Mapping[str, Any]) -> bool:
    """Whether a recorded owner may still run; another host's cannot be asked, so it may."""
    if owner.get("host") != socket.gethostname():
        return True
    if owner.get("boot_id") != boot_id():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
