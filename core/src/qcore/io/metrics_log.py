"""``metrics.jsonl`` of a run: rows are appended one by one and truncated when a run is resumed.

This file decides how a row reaches the disk, and that a line which a kill left incomplete is
dropped. `qcore.training.metrics_sink` decides which steps have a row.

Codes: ``QC-WRITE-003`` to ``-006`` from `qcore.io.atomic`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ..reporting import plain
from .atomic import reading, rewrite, sync_folder, write_all, writing


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line.

    A written line survives the death of the process, because it is passed to the system at once.
    The file is synced before a checkpoint (`sync`) and when it is closed, not at every line. An
    incomplete last line is dropped when the log is opened again.

    Args:
        path: path of the file; it need not exist.

    Attributes:
        path: path of the file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._fd = -1

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row.

        Args:
            row: the values; NaN and infinities are written as strings, such as ``"NaN"``.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006`` the system refused the write.
        """
        line = json.dumps(plain(row), allow_nan=False).encode("ascii") + b"\n"
        with writing(self.path):
            if self._fd < 0:
                self._open()
            write_all(self._fd, memoryview(line))

    def truncate_after(self, step: int) -> None:
        """Drop the rows after ``step``, which a resumed run writes again.

        Rows without a ``step`` stay; lines that are not JSON are dropped. The file is replaced
        atomically.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006`` the system refused the write.
            InputError: ``QC-READ-001`` the file cannot be read.
        """
        self.close()
        if not self.path.exists():
            return
        with reading(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True)
        content = b"".join(line for line in lines if _belongs_up_to(line, step))
        rewrite(self.path, [content])

    def sync(self) -> None:
        """Make the rows durable that were written so far: a checkpoint is about to claim them.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006`` the system refused it.
        """
        if self._fd >= 0:
            with writing(self.path):
                os.fsync(self._fd)

    def close(self) -> None:
        """Sync and close the file; a later `write` opens it again."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with writing(self.path):
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o666)
        try:
            end = size = os.fstat(fd).st_size
            while end and os.pread(fd, 1, end - 1) != b"\n":
                end -= 1
            if end != size:
                os.ftruncate(fd, end)
            if not end:  # it may be new: its name is durable before a checkpoint claims its rows
                sync_folder(self.path.parent)
        except OSError:
            os.close(fd)
            raise
        self._fd = fd


def _belongs_up_to(line: bytes, step: int) -> bool:
    """Whether a line is a complete row without a step, or with a step up to `step`."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    if not line.endswith(b"\n") or not isinstance(row, dict):
        return False
    at = row.get("step")
    return not isinstance(at, int | float) or at <= step
