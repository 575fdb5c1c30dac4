"""On-disk store of media payloads, to process an image or video again after cache eviction.

This file decides that payloads are stored on disk, because a run may have millions of images, and
rows may contain the bytes themselves. SQLite keeps the file in its folder for temporary files
(``SQLITE_TMPDIR``, ``TMPDIR``, ``/var/tmp``) without a name, so that the file disappears however
the process ends. Two megabytes of it are in memory; on disk it takes the bytes that rows contain
plus a few hundred bytes per image or video. The module imports no torch, and SQLite only when a
store is created.

- ``QC-WRITE-003`` to ``-006`` the file cannot be written.
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
    BEGIN;  -- never committed: no other connection reads it
"""


_FILE: Final = Path("temporary media file")
_FIX: Final = "set TMPDIR to a writable folder with free space"


class PayloadStore:
    """Payloads, keyed by the digest of their processed values."""

    def __init__(self) -> None:
        import sqlite3

        with _write_errors():
            self._base = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            weakref.finalize(self, self._base.close)
            self._base.executescript(_TABLES)

    def add(self, digest: str, payload: Payload) -> bool:
        """Store a payload. Returns True if its digest is new.

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
        """The stored payload of `digest`, or ``None``."""
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
    """Convert exceptions of SQLite to `WriteError`."""
    import sqlite3

    try:
        yield
    except sqlite3.Error as error:
        raise _write_error(error) from None


def _write_error(error: Any) -> WriteError:
    """A `WriteError` for an exception of SQLite, with SQLite's message."""
    import sqlite3

    extended = getattr(error, "sqlite_errorcode", None) or 0  # absent on errors of Python's wrapper
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
