"""Stores that are kept between runs, so that a second start renders no row.

This file decides where they lie (``$XDG_CACHE_HOME/qcore/data``; ``QCORE_DATA_CACHE`` names another
folder), that one run writes a store while others of the same rows wait for it, that what killed
runs left is deleted, and which stores are evicted: the least recently used, once all of them take
more than ``QCORE_DATA_CACHE_GB`` (default 50; 0 keeps none). A store may be deleted at any time,
because a run that uses it has its files open. `qcore.data.store.entry` decides when a store can be
used; one that is damaged is made again.

Codes: ``QC-DATA-081`` a data file changed unnoticed, ``-082`` the limit is not a size.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...api.files import user_cache
from ...errors import QcoreError, UsageError, WriteError
from ...io.artifact import publish
from ...io.atomic import make_folders, remove_tree
from ...io.leftovers import sweep_inside
from ...io.run_lock import Lock
from ...reporting import Reporter
from .entry import KIND, Damaged, Loaded, Request, open_entry, render_apart, write_entry
from .stamps import Changed

if TYPE_CHECKING:
    from ...checkpoint.identity import Identity

FOLDER_VARIABLE: Final = "QCORE_DATA_CACHE"
SIZE_VARIABLE: Final = "QCORE_DATA_CACHE_GB"
_DEFAULT_GB: Final = 50.0
_DIGITS: Final = 32  #: of the identity's digest, which name a store
_NAME: Final = re.compile(rf"[0-9a-f]{{{_DIGITS}}}")
_PAUSE: Final = 0.2  #: seconds between two looks at a lock


class _NotKept(Exception):
    """A store is of use to this run alone."""


class StoreCache:
    """The folder of kept stores.

    Args:
        folder: the folder; ``None``: no store is used or kept.
        most: bytes that all stores together may take; 0: as without a folder.
        reporter: receives notes and progress.
        verify: hash all data and media files, also those that are recognized.
    """

    def __init__(
        self,
        folder: Path | None,
        most: int,
        reporter: Reporter | None = None,
        *,
        verify: bool = False,
    ) -> None:
        self.folder = folder if most else None
        self.most = most
        self.reporter = reporter or Reporter()
        self.verify = verify
        self._why = ""  # a store cannot be used

    @classmethod
    def of_user(cls, reporter: Reporter, *, verify: bool = False) -> StoreCache:
        """The folder in the user's cache, as configured by environment variables.

        Raises:
            UsageError: ``QC-DATA-082``.
        """
        most = _size_limit(os.environ.get(SIZE_VARIABLE, ""))
        named = os.environ.get(FOLDER_VARIABLE, "")
        folder: Path | None
        try:
            folder = Path(named).expanduser().absolute() if named else user_cache("data")
        except RuntimeError:  # the home folder is unknown
            folder = None
        return cls(folder, most, reporter, verify=verify)

    def load(self, request: Request, identify: Callable[[], Identity | None]) -> Loaded:
        """The samples of some rows, from a kept store or rendered.

        Args:
            request: the rows.
            identify: makes the identity of their tokens, if stores are kept.

        Raises:
            InputError: ``QC-DATA-081`` a file changed while it was read, or unnoticed; as
                `Request.render`.
            WriteError: ``QC-WRITE-003`` to ``-006`` the store cannot be written.
        """
        try:
            if self.folder is not None:
                request = replace(request, identity=identify())
            return self._load(request)
        except WriteError as error:
            raise _with_fix(error) from error

    def _load(self, request: Request) -> Loaded:
        if self.folder is None or request.identity is None:
            return render_apart(request, self.reporter)
        self._sweep(self.folder)
        entry = self.folder / request.identity.name[:_DIGITS]
        if loaded := self._open(entry, request):
            return loaded
        if not _writable(self.folder):
            self.reporter.note(
                f"the tokens of these rows are not kept for the next run: {self.folder} is not "
                f"writable (set {FOLDER_VARIABLE} to a folder that is)"
            )
            return render_apart(request, self.reporter)
        with self._locked(self.folder, entry.name):
            if loaded := self._open(entry, request):  # another run has made it meanwhile
                return loaded
            if self._why:
                self.reporter.note(
                    f"the stored tokens of these rows are damaged and are made again: {self._why}"
                )
            return self._render(entry, request)

    @contextmanager
    def _locked(self, folder: Path, name: str) -> Iterator[None]:
        """The lock of one entry, which a second run of the same rows waits for."""
        lock, waits = Lock(folder, f".{name}.lock"), False
        while True:
            try:
                lock.acquire()
                break
            except WriteError as error:
                if error.code != "QC-WRITE-010":
                    raise
            if not waits:
                self.reporter.note("another run makes the tokens of the same rows: waiting for it")
            waits = True
            time.sleep(_PAUSE)
        try:
            yield
        finally:
            lock.release()

    def _open(self, entry: Path, request: Request) -> Loaded | None:
        """The store of an entry; ``None`` if there is none that can be used."""
        self._why = ""
        if not entry.is_dir():
            return None
        try:
            return open_entry(entry, request, self.reporter, verify=self.verify)
        except Changed as changed:
            if self.verify and changed.hidden:
                with suppress(WriteError):
                    remove_tree(entry)
                fix = "run the command again, which reads its rows again"
                raise changed.error(fix) from None
        except Damaged as damaged:
            self._why = str(damaged)
        except QcoreError as error:
            self._why = error.what
        except (OSError, ValueError, LookupError, TypeError) as error:
            if entry.is_dir():  # else another run has evicted it meanwhile
                self._why = f"{type(error).__name__}: {error}"
        return None

    def _render(self, entry: Path, request: Request) -> Loaded:
        """Render the rows and publish their store."""
        remove_tree(entry)
        loaded: Loaded | None = None
        try:
            with publish(entry, kind=KIND) as out:
                loaded = write_entry(out, entry, request, self.reporter)
                if loaded.size > self.most:
                    self.reporter.note(
                        "the tokens of these rows are not kept for the next run: they take "
                        f"{loaded.size / 1e9:.1f} GB ({SIZE_VARIABLE}={self.most / 1e9:g})"
                    )
                if loaded.size > self.most or not loaded.lasting:
                    raise _NotKept
        except _NotKept:
            assert loaded is not None
            return loaded
        self._evict(entry)
        return loaded

    def _sweep(self, folder: Path) -> None:
        """Delete what killed runs left: hidden folders, and locks that no process holds."""
        sweep_inside(folder, _NAME)
        for found in folder.glob(".*.lock"):
            if _NAME.fullmatch(found.name[1:-5]):
                with suppress(WriteError), Lock(folder, found.name):
                    pass

    def _evict(self, used: Path) -> None:
        """Delete the least recently used stores beyond the limit, but not the one in use."""
        stores: list[tuple[float, int, Path]] = []
        for found in os.scandir(used.parent):
            if _NAME.fullmatch(found.name):
                with suppress(OSError):
                    size = sum(file.stat().st_size for file in os.scandir(found.path))
                    stores.append((found.stat().st_mtime, size, Path(found.path)))
        total = sum(size for _, size, _ in stores)
        for _, size, path in sorted(stores):
            if total <= self.most:
                return
            if path != used:
                with suppress(WriteError):
                    remove_tree(path)
                    total -= size


def _writable(folder: Path) -> bool:
    """Whether the folder can be written; it is made if it does not exist."""
    try:
        make_folders(folder)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _size_limit(text: str) -> int:
    """The limit in bytes.

    Raises:
        UsageError: ``QC-DATA-082``.
    """
    try:
        size = float(text) if text.strip() else _DEFAULT_GB
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise UsageError(
            "QC-DATA-082",
            "is not a size",
            field=SIZE_VARIABLE,
            found=text,
            expected="gigabytes, 0 or more",
            fix=f"unset it for {_DEFAULT_GB:g}",
        )
    return int(size * 1e9)


def _with_fix(error: WriteError) -> WriteError:
    """The same error with a fix that moves what is written."""
    if error.code not in ("QC-WRITE-003", "QC-WRITE-004"):
        return error
    return error.replace(
        fix=f"free space, or set {FOLDER_VARIABLE} (or TMPDIR, which is {tempfile.gettempdir()}) "
        "to a folder on another disk"
    )
