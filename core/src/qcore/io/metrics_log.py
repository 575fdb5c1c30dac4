"""``metrics.jsonl`` of a run: rows appended one by one, cut back when a run is resumed.

This file decides how a row reaches the disk, and what becomes of a line that a kill left
incomplete. Which steps have a row is up to `training.metrics_sink`.

Codes: ``QC-WRITE-003`` to ``-006`` from `io.atomic`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ..reporting import plain
from .atomic import create, reading, sync_folder, write_all, writing


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, on disk when `write` returns.

    A line that a kill tore is dropped when the log is opened again. The file survives the
    death of the process at once; it is synced when closed, not at every line.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._fd = -1

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row; NaN and infinities are written as the strings that name them.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006``.
        """
        line = json.dumps(plain(row), allow_nan=False).encode("ascii") + b"\n"
        with writing(self.path):
            if self._fd < 0:
                self._open()
            write_all(self._fd, memoryview(line))

    def truncate_after(self, step: int) -> None:
        """Drop the rows after ``step``, which a resumed run writes again.

        Rows without a ``step`` stay; a line that is not JSON goes. The file is replaced in
        one rename.
        """
        self.close()
        if not self.path.exists():
            return
        with reading(self.path):
            lines = self.path.read_bytes().splitlines(keepends=True)
        kept = b"".join(line for line in lines if _up_to(line, step))
        fresh = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        with writing(self.path):
            try:
                fd = create(fresh)
                try:
                    write_all(fd, memoryview(kept))
                    os.fsync(fd)
                finally:
                    os.close(fd)
                os.replace(fresh, self.path)
            except OSError:
                with suppress(OSError):
                    os.unlink(fresh)
                raise
            sync_folder(self.path.parent)

    def close(self) -> None:
        """Sync and close; a later `write` opens it again."""
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
        except OSError:
            os.close(fd)
            raise
        self._fd = fd


def _up_to(line: bytes, step: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    if not line.endswith(b"\n") or not isinstance(row, dict):
        return False
    at = row.get("step")
    return not isinstance(at, int | float) or at <= step
