"""The lock of a run folder: one process at a time writes into it.

This file decides which process may write into a run folder. Unlike an artifact
(`qcore.io.artifact`), a run folder grows during the run, so it has no manifest; anything inside it
that must be complete is published there as an artifact. The package filelock is not used: it
creates the folder itself, which fails while another run deletes it, it raises on a file system
without locks, and it records no owner.

Codes: ``QC-WRITE-003`` to ``-006`` from `qcore.io.atomic`, ``-010`` the folder is in use.
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
from .atomic import make_folders, write_all, writing
from .leftovers import ATTEMPTS, names

LOCK: Final = ".qcore.lock"
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_LOCKS: Final = frozenset((errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL))


class Lock:
    """Exclusive use of a run folder, as a context manager.

    The lock is a kernel lock, which ends with the process. The owner (pid, boot id, host) in the
    file is for the error message. On a file system without locks the owner decides: the lock is
    stale if the owner ran in an earlier boot or its process is gone.

    Args:
        folder: the run folder.
        name: name of the lock file.
        create: create the folder if it does not exist, also where another run deletes it between
            its creation and the lock.

    Attributes:
        created: the folders that were created, outermost first.
    """

    def __init__(self, folder: Path | str, name: str = LOCK, *, create: bool = False) -> None:
        self._path = Path(folder) / name
        self._create = create
        self._fd = -1
        self._pid = 0
        self.created: list[Path] = []

    def acquire(self) -> Self:
        """Take the lock.

        Raises:
            WriteError: ``QC-WRITE-010`` another run has the lock, ``-003`` to ``-006`` the lock
                file cannot be written.
        """
        with writing(self._path.parent if self._create else self._path):
            attempts = 0
            while self._fd < 0:
                if self._create:
                    self.created += make_folders(self._path.parent)
                try:
                    fd = os.open(self._path, _FLAGS, 0o666)
                except FileNotFoundError:
                    # Another run may have deleted the folder after it was created.
                    if not self._create or (attempts := attempts + 1) > ATTEMPTS:
                        raise
                    continue
                try:
                    if self._lock(fd) and names(self._path, fd):
                        self._fd, self._pid, fd = fd, os.getpid(), -1
                finally:
                    if fd >= 0:
                        os.close(fd)
        with writing(self._path):
            try:
                os.ftruncate(self._fd, 0)
                write_all(self._fd, memoryview(json.dumps(_owner()).encode()))
            except OSError:
                os.close(self._fd)
                self._fd = -1
                raise
        return self

    def release(self) -> None:
        """Release the lock; does nothing if it was not acquired."""
        if self._fd < 0:
            return
        # A forked child must not release its parent's lock. If the folder was deleted, the path may
        # name the lock file of the run that created it again.
        if self._pid == os.getpid() and names(self._path, self._fd):
            with suppress(OSError):
                os.unlink(self._path)  # before the lock, so that a waiter notices (`names`)
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
                    raise self._in_use(owner) from error
                return True
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._in_use(_read_owner(fd)) from error
            raise
        return True

    def _in_use(self, owner: Mapping[str, Any] | None) -> WriteError:
        user = "another run"
        if owner is not None:
            user = f"process {owner.get('pid')} on {owner.get('host')}"
        return WriteError(
            "QC-WRITE-010",
            f"is in use by {user}",
            file=self._path.parent,
            fix="wait for that run, or name another folder",
        )


def boot_id() -> str:
    """Return an id of the current boot of this machine; empty if the system has none."""
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
    """Whether a recorded owner may still run; assumed for an owner on another host."""
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
