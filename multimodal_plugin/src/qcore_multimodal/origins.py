"""What values of media were made of, for when they are gone from the cache and made again.

This file decides that it lies on disk, as a run may have millions of media, and rows that hold the
bytes themselves. The file is SQLite's, in its folder of temporary files (``SQLITE_TMPDIR``,
``TMPDIR``, ``/var/tmp``), and has no name there, so that nothing is left of it however a process
ends. Two megabytes of it are in memory; on disk it is as large as what rows hold, which is less
than the data file. It imports no torch.

- ``QC-WRITE-003``, ``-004`` it cannot be written.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qcore.data.media import Payload
from qcore.durable import writing

_TABLES: Final = """
    PRAGMA journal_mode = OFF;
    PRAGMA temp_store = FILE;
    CREATE TABLE origins (
        digest TEXT PRIMARY KEY, kind TEXT, sha256 TEXT, path BLOB, options TEXT
    ) WITHOUT ROWID;
    CREATE TABLE held (sha256 TEXT PRIMARY KEY, data BLOB);
    BEGIN;  -- and never end: nobody else reads it
"""


class Origins:
    """Payloads by the digest of their values."""

    def __init__(self) -> None:
        with _kept():
            self._base = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            self._base.executescript(_TABLES)

    def add(self, digest: str, payload: Payload) -> bool:
        """Keep a payload; whether it is new.

        Raises:
            WriteError: ``QC-WRITE-003``, ``-004``.
        """
        path = None if payload.path is None else os.fsencode(payload.path)
        row = (digest, payload.kind, payload.sha256, path, json.dumps(dict(payload.options)))
        with _kept():
            if payload.data is not None:
                hold = "INSERT OR IGNORE INTO held VALUES (?, ?)"
                self._base.execute(hold, (payload.sha256, payload.data))
            put = "INSERT OR IGNORE INTO origins VALUES (?, ?, ?, ?, ?)"
            return self._base.execute(put, row).rowcount == 1

    def find(self, digest: str) -> Payload | None:
        """The payload that was kept, or ``None``."""
        ask = "SELECT kind, sha256, path, options, data FROM origins LEFT JOIN held USING (sha256)"
        with _kept():
            row = self._base.execute(f"{ask} WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            return None
        kind, sha256, path, options, data = row
        return Payload(
            kind=kind,
            sha256=sha256,
            path=None if path is None else Path(os.fsdecode(path)),
            data=data if path is None else None,
            options=json.loads(options),
        )


@contextmanager
def _kept() -> Iterator[None]:
    """What SQLite raises is a failure to write, of a file that has no name."""
    with writing(Path("temporary file of media")):
        try:
            yield
        except sqlite3.OperationalError as error:
            full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
            raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None
