"""`Stream`: a file of an artifact that is hashed while it is written.

This file decides how bytes are written and hashed. `qcore.io.artifact` decides where.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from .atomic import write_all, writing
from .manifest import FileEntry

_LARGE = 1 << 20  # bytes from which hashing in a thread is faster


class Stream:
    """A file of an artifact that is being written and hashed.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, fd: int, shown: Path) -> None:
        self._fd = fd
        self._shown = shown
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of ``data``.

        Args:
            data: a C-contiguous buffer of any item type.

        Returns:
            The number of bytes written.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006`` the system refused the write.
        """
        view = memoryview(data).cast("B")
        # Hashing a large buffer takes as long as writing it, and both release the GIL.
        hashing = threading.Thread(target=self._digest.update, args=(view,))
        hashing.start() if len(view) > _LARGE else self._digest.update(view)
        try:
            with writing(self._shown):
                write_all(self._fd, view)
        finally:
            if len(view) > _LARGE:
                hashing.join()
        self.size += len(view)
        return len(view)

    def entry(self) -> FileEntry:
        """Return the manifest entry for the bytes written so far."""
        return FileEntry(size=self.size, sha256=self._digest.hexdigest())
