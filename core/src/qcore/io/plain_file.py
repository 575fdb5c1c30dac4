"""Opens files that people name, and refuses what is not a plain file before a byte is read.

This file decides what is called a plain file, and what the other kinds are called. A pipe without
a writer would block, and a device may never end. It changes nothing on disk.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def other_kind(mode: int) -> str | None:
    """What a file of this mode is; ``None`` for a plain file."""
    return next((word for test, word in _KINDS if test(mode)), None)


def open_plain(path: Path) -> int:
    """Open a plain file for reading, without waiting for the writer of a pipe.

    Returns:
        The file descriptor, which the caller closes.

    Raises:
        OSError: it cannot be opened, or is not a plain file (``EINVAL``, with its kind).
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = other_kind(os.fstat(fd).st_mode)
    if kind is not None:
        os.close(fd)
        raise OSError(errno.EINVAL, f"{kind}, not a plain file", str(path))
    return fd
