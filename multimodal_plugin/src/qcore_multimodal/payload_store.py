"""What values of media were made of, for when they are gone from the cache and made again.

This file decides that it lies on disk, as a run may have millions of media, and rows that hold the
bytes themselves. The file is SQLite's, in its folder of temporary files (``SQLITE_TMPDIR``,
``TMPDIR``, ``/var/tmp``), and has no name there, so that nothing is left of it however a process
ends. Two megabytes of it are in memory; on disk it is as large as the bytes that rows hold, and
some hundreds of bytes more for each medium. It imports no torch, and SQLite where one is made.

- ``QC-WRITE-003`` to ``-006`` it cannot be written.
"""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from qcore.api import Payload, write_error
from qcore.errors import WriteError

_TABLES: Final = """
    PRAGMA journal_mode = OFF;
    PRAGMA temp_store = FILE;
    CREATE TABLE payloads (
        digest TEXT PRIMARY KEY, kind TEXT, sha256 TEXT, path BLOB, options TEXT
    ) WITHOUT ROWID;
    CREATE TABLE contents (sha256 TEXT PRIMARY KEY, data BLOB);
    BEGIN;  -- and never end: nobody else reads it
"""


_FILE: Final = Path("temporary file of media")
_FIX: Final = "set TMPDIR to a folder that can be written and has space"


class PayloadStore:
    """Payloads by the digest of their values."""

    def __init__(self) -> None:
        import sqlite3

        with _write_errors():
            self._base = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._base.close)
            self._base.executescript(_TABLES)

    def add(self, digest: str, payload: Payload) -> bool:
        """Keep a payload; whether it is new.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006``.
        """
        path = None if payload.path is None else os.fsencode(payload.path)
        row = (digest, payload.kind, payload.sha256, path, json.dumps(dict(payload.options)))
        with _write_errors():
            if payload.data is not None:
                insert = "INSERT OR IGNORE INTO contents VALUES (?, ?)"
                self._base.execute(insert, (payload.sha256, payload.data))
            insert = "INSERT OR IGNORE INTO payloads VALUES (?, ?, ?, ?, ?)"
            return self._base.execute(insert, row).rowcount == 1

    def find(self, digest: str) -> Payload | None:
        """The payload that was kept, or ``None``."""
        query = (
            "SELECT kind, sha256, path, options, data "
            "FROM payloads LEFT JOIN contents USING (sha256) WHERE digest = ?"
        )
        with _write_errors():
            row = self._base.execute(query, (digest,)).fetchone()
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
def _write_errors() -> Iterator[None]:
    """What SQLite raises is a failure to write, of a file that has no name."""
    import sqlite3

    try:
        yield
    except sqlite3.Error as error:
        raise _write_error(error) from None


def _write_error(error: Any) -> WriteError:
    """An error of SQLite's, in its own words too, which say more than a code."""
    import sqlite3

    extended = getattr(error, "sqlite_errorcode", None) or 0  # some are Python's and have none
    codes = {
        sqlite3.SQLITE_FULL: errno.ENOSPC,
        sqlite3.SQLITE_IOERR: errno.EIO,
        sqlite3.SQLITE_IOERR_GETTEMPPATH: errno.EACCES,
        sqlite3.SQLITE_CANTOPEN: errno.EACCES,
        sqlite3.SQLITE_PERM: errno.EACCES,
        sqlite3.SQLITE_READONLY: errno.EACCES,
    }
    code = codes.get(extended) or codes.get(extended & 0xFF, 0)
    failure = write_error(OSError(code, str(error)), _FILE)
    what = failure.what if str(error) in failure.what else f"{failure.what} ({error})"
    return WriteError(failure.code, what, file=_FILE, fix=_FIX)
