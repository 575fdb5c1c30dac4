"""``metrics.jsonl`` of a run: rows are appended one by one and truncated when a run is resumed.

This file decides how a row reaches the disk, and that a line which a kill left incomplete is
dropped. `qcore.training.metrics_sink` decides which steps have a row.

Codes: ``QC-WRITE-003`` to ``-006`` from `qcore.io.atomic`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Self

from ..errors import WriteError
from ..reporting import plain
from .atomic import reading, rewrite, sync_folder, write_all, writing


class MetricsLog:
    """``metrics.jsonl``: one JSON object per line.

    A written line survives the death of the process, because it is passed to the system at once.
    The file is synced before a checkpoint (`sync_rows`) and when it is closed, not at every line.
    An incomplete last line is dropped when the log is opened again.

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
        """Drop the rows after ``step``, and a last evaluation: a resumed run writes them again.

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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(WriteError) if kind else nullcontext():  # the first error is the one to name
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
        except OSError:
            os.close(fd)
            raise
        self._fd = fd


def sync_rows(path: Path) -> None:
    """Make the rows that were written so far durable; does nothing without a file.

    Args:
        path: path of the file, which may be open.

    Raises:
        WriteError: ``QC-WRITE-003`` to ``-006`` the system refused it.
    """
    with writing(path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_folder(path.parent)


def _belongs_up_to(line: bytes, step: int) -> bool:
    """Whether a line is a complete row without a step, or with a step up to `step`."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    if not line.endswith(b"\n") or not isinstance(row, dict):
        return False
    at = row.get("step")
    if not isinstance(at, int | float):
        return True
    return at < step or (at == step and ("loss" in row or "eval_loss" not in row))
