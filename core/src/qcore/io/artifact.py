"""Publishes a result folder atomically: the complete folder appears under its name, or nothing.

This file decides how a result is published: it is written into a hidden folder next to the target,
every file is hashed while it is written and then synced, MANIFEST.json comes last, and one rename
gives the folder its name. A failure or kill before the rename leaves the target unchanged.
`qcore.io.manifest` decides the manifest's format and `qcore.io.folder_check` what `verify`
compares; `qcore.io.run_lock` handles run folders, which grow during training.

Codes: ``QC-WRITE-001`` the target is not empty, ``-002`` the target cannot become a folder,
``-003`` to ``-006`` from `qcore.io.atomic`, ``-007`` too little free space, ``-008`` an invalid
file name, ``-009`` a file is written twice, ``-010`` the run folder is in use
(`qcore.io.run_lock`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from ..errors import WriteError
from .atomic import (
    CHUNK,
    create,
    delete,
    drop_folders,
    make_folders,
    reading,
    sync_folder,
    write_all,
    write_error,
    writing,
)
from .folder_check import Report, verify
from .leftovers import ATTEMPTS, OLD, hidden, new_folder, sweep
from .manifest import MANIFEST, FileEntry, Manifest, read_manifest, unsafe
from .output_place import check_place
from .stream import Stream
from .version import __version__

__all__ = [
    "MANIFEST",
    "Report",
    "Stream",
    "Writer",
    "check_target",
    "publish",
    "read_manifest",
    "verify",
]

_NEW: Final = "name a new folder"


class Writer:
    """Writes the files of one artifact; `publish` yields it.

    Attributes:
        meta: the manifest's meta mapping; its values must be JSON.
        files: the manifest entries of the files written so far, by name.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self._folder = folder
        self._target = target
        self.meta: dict[str, Any] = {}
        self.files: dict[str, FileEntry] = {}

    @property
    def folder(self) -> Path:
        """The temporary folder of the files, for checks that read them before publishing."""
        return self._folder

    @contextmanager
    def stream(self, name: str) -> Iterator[Stream]:
        """Open a file to write in pieces; it is listed if the block ends without an error.

        Args:
            name: ``file`` or ``folder/file``.

        Yields:
            The open file.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006`` the system refused the write, ``-008`` the
                name is invalid, ``-009`` the file was already written.
        """
        shown = self._target / name
        if (reason := unsafe(name)) is not None:
            raise WriteError(
                "QC-WRITE-008", f"cannot be a file of an artifact: {reason}", file=name
            )
        path = self._folder / name
        with writing(shown):
            if path.parent != self._folder and not path.parent.is_dir():
                os.mkdir(path.parent)
            try:
                fd = create(path)
            except FileExistsError:
                raise WriteError("QC-WRITE-009", "is written twice", file=shown) from None
        listed = False
        try:
            stream = Stream(fd, shown)
            yield stream
            with writing(shown):
                os.fsync(fd)
            self.files[name] = stream.entry()
            listed = True
        finally:
            with writing(shown) if listed else suppress(OSError):
                os.close(fd)
                if not listed:
                    os.unlink(path)

    def write_bytes(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Write a whole file."""
        with self.stream(name) as out:
            out.write(data)

    def write_text(self, name: str, text: str) -> None:
        """Write text as UTF-8, without newline translation."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any, *, editable: Collection[str] | None = None) -> None:
        """Write JSON, indented by two spaces, keys in insertion order.

        Args:
            name: ``file`` or ``folder/file``.
            value: the content.
            editable: fields of a mapping that people may edit later without a problem in
                `verify`, which then compares the other fields; ``None``: the bytes decide.

        Raises:
            ValueError: the value contains a NaN or an infinity.
        """
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")
        if editable is not None:
            self.files[name] = replace(
                self.files[name], fields=value, editable=tuple(sorted(editable))
            )

    def copy(self, name: str, source: Path) -> None:
        """Copy a file; it is read once and hashed while it is copied.

        Args:
            name: ``file`` or ``folder/file``.
            source: the file to copy; links are followed.

        Raises:
            InputError: ``QC-READ-001`` the source cannot be read.
            WriteError: see `stream`.
        """
        with reading(source), open(_open_plain(source), "rb", buffering=0) as file:
            buffer = memoryview(bytearray(min(CHUNK, max(os.fstat(file.fileno()).st_size, 1))))
            with self.stream(name) as out:
                while count := file.readinto(buffer):
                    out.write(buffer[:count])


def _open_plain(path: Path) -> int:
    """Open a regular file for reading; a pipe or a folder raises ``OSError`` without blocking."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return fd


def check_target(path: Path | str, *, overwrite: bool = False, need_bytes: int = 0) -> Path:
    """Check that an artifact can be published at a path, without changing anything.

    Call it before expensive work.

    Args:
        path: the target; it must not exist or be an empty folder.
        overwrite: also accept a folder with an artifact that qcore wrote.
        need_bytes: required free space in bytes.

    Returns:
        The target with links resolved.

    Raises:
        WriteError: ``QC-WRITE-001`` the folder is not empty, ``-002`` the target is a file, a
            mount point or below a file, ``-005`` the folder is not writable, ``-007`` there is too
            little free space, ``-020`` the current folder, or a place inside a model or adapter.
    """
    shown, target = Path(path), Path(os.path.realpath(path))
    with writing(shown):
        if target.is_dir():
            _check_folder(shown, target, overwrite)
        elif os.path.lexists(target):
            raise WriteError(
                "QC-WRITE-002", "is a file", file=shown, expected="a new folder", fix=_NEW
            )
        parent = target.parent
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            raise WriteError(
                "QC-WRITE-002", f"{parent} is not a folder", file=shown, fix="name another folder"
            )
        if not os.access(parent, os.W_OK | os.X_OK):
            raise write_error(OSError(errno.EACCES, "not permitted"), parent)
        check_place(shown, target)
        free = shutil.disk_usage(parent).free
    if free < need_bytes:
        raise WriteError(
            "QC-WRITE-007",
            "too little free space",
            file=shown,
            found=f"{free / 1e9:.2f} GB",
            expected=f"{need_bytes / 1e9:.2f} GB",
            fix="free space or name another disk",
        )
    return target


def _check_folder(shown: Path, target: Path, overwrite: bool) -> None:
    if os.path.ismount(target):
        raise WriteError(
            "QC-WRITE-002", "is a mount point", file=shown, fix="name a folder inside it"
        )
    if not any(os.scandir(target)):
        return
    fix = f"{_NEW}, or empty this one" if target != Path.cwd() else _NEW
    if not overwrite:
        raise WriteError("QC-WRITE-001", "is not empty", file=shown, fix=fix)
    if not (target / MANIFEST).is_file():
        what = f"is not empty and has no {MANIFEST}, so qcore does not replace it"
        raise WriteError("QC-WRITE-001", what, file=shown, fix=fix)


@contextmanager
def publish(
    path: Path | str, kind: str = "adapter", overwrite: bool = False, *, need_bytes: int = 0
) -> Iterator[Writer]:
    """Write an artifact; the target appears, complete and durable, when the block ends.

    Args:
        path: the target; it must not exist (missing parents are created) or be an empty folder.
        kind: the kind recorded in the manifest.
        overwrite: replace an existing artifact that qcore wrote. A kill between the two renames
            leaves the target absent and the old artifact next to it, as ``.NAME.old-*``.
        need_bytes: required free space in bytes, checked before anything is written.

    Yields:
        The writer of the artifact's files.

    Raises:
        WriteError: ``QC-WRITE-*`` (see the module). After this or any other exception the target
            is unchanged.
    """
    shown = Path(path)
    target = check_target(path, overwrite=overwrite, need_bytes=need_bytes)
    temporary, lock_fd, made = _begin(target, shown)
    published = False
    try:
        writer = Writer(temporary, shown)
        yield writer
        _finish(writer, temporary, kind, shown)
        _install(temporary, target, shown, overwrite)
        published = True
        sweep(target)
    finally:
        os.close(lock_fd)
        if not published:
            with suppress(OSError):
                delete(temporary)
            drop_folders(made)


def _begin(target: Path, shown: Path) -> tuple[Path, int, list[Path]]:
    """Create the temporary folder; also returns its lock, and the parents that were created."""
    made: list[Path] = []
    sweep(target)  # first: it may free the space that the new folder needs
    for attempt in range(ATTEMPTS):
        with writing(shown.parent):
            made += make_folders(target.parent)
        try:
            with writing(shown):
                return *new_folder(target), made
        except WriteError:
            # Where a parent is gone, a run that failed beside this one has deleted it.
            if target.parent.is_dir() or attempt == ATTEMPTS - 1:
                drop_folders(made)
                raise
    raise AssertionError("the last attempt returns or raises")


def _finish(writer: Writer, temporary: Path, kind: str, shown: Path) -> None:
    """Write the manifest and sync all folders."""
    manifest = Manifest(
        kind=kind,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        qcore=__version__,
        files=writer.files,
        meta=writer.meta,
    )
    data = manifest.to_bytes()
    with writing(shown / MANIFEST):
        fd = create(temporary / MANIFEST)
        try:
            write_all(fd, memoryview(data))
            os.fsync(fd)
        finally:
            os.close(fd)
    with writing(shown):
        for folder in sorted({name.rpartition("/")[0] for name in writer.files} - {""}):
            sync_folder(temporary / folder)
        sync_folder(temporary)


def _install(temporary: Path, target: Path, shown: Path, overwrite: bool) -> None:
    """Rename the finished folder to the target; on failure the target is unchanged."""
    aside: Path | None = None
    was_empty_folder = False
    renamed = False
    try:
        if overwrite and (target / MANIFEST).is_file():
            aside = hidden(target, OLD)
            os.rename(target, aside)
        else:
            was_empty_folder = target.is_dir()
        os.rename(temporary, target)  # replaces an empty folder; any other raises ENOTEMPTY
        renamed = True
        sync_folder(target.parent)
    except OSError as error:
        with suppress(OSError):
            if renamed:
                os.rename(target, temporary)
            if aside is not None and not target.exists() and aside.exists():
                os.rename(aside, target)
            elif renamed and was_empty_folder:
                os.mkdir(target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            what = "was filled by another process meanwhile"
            raise WriteError("QC-WRITE-001", what, file=shown, fix="name a new folder") from error
        raise write_error(error, shown) from error
