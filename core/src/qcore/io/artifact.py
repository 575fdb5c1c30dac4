"""Publishing a result folder atomically: the whole folder appears under its name, or nothing.

This file decides how a result is published: written into a hidden folder beside the target,
every file hashed as it is written and synced, MANIFEST.json last, then one rename. Whatever
fails or is killed before the rename leaves the target as it was. It leaves the manifest's
format and `verify` to `qcore.io.manifest`, and run folders, which grow while training, to
`qcore.io.run_lock`.

Codes: ``QC-WRITE-001`` target not empty, ``-002`` target that cannot become a folder,
``-003`` to ``-006`` from `qcore.io.atomic`, ``-007`` too little free space, ``-008`` a file
name that an artefact may not hold, ``-009`` a name written twice, ``-010`` a run folder that
is in use (`qcore.io.run_lock`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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
from .manifest import MANIFEST, FileEntry, Manifest, Report, read_manifest, unsafe, verify
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

_LARGE = 1 << 20  # bytes from which a thread is worth its start


class Stream:
    """A file of an artefact that is being written and hashed.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, fd: int, shown: Path) -> None:
        self._fd = fd
        self._shown = shown
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of ``data`` (C-contiguous, of any item type); returns its bytes.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006``.
        """
        view = memoryview(data).cast("B")
        # Hashing a large piece takes as long as writing it, and both let other threads run.
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
        """What the manifest says of the bytes so far."""
        return FileEntry(size=self.size, sha256=self._digest.hexdigest())


class Writer:
    """Writes the files of one artefact; `publish` makes it.

    Attributes:
        meta: what the manifest carries beside the files; must be JSON.
        files: the files written so far.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self._folder = folder
        self._target = target
        self.meta: dict[str, Any] = {}
        self.files: dict[str, FileEntry] = {}

    @property
    def folder(self) -> Path:
        """Where the files lie until they are published, for checks that read them back."""
        return self._folder

    @contextmanager
    def stream(self, name: str) -> Iterator[Stream]:
        """A file to write piece by piece; listed once the block ends without an error.

        Args:
            name: ``file`` or ``folder/file``.

        Raises:
            WriteError: ``QC-WRITE-003`` to ``-006``, ``-008``, ``-009``.
        """
        shown = self._target / name
        if (reason := unsafe(name)) is not None:
            raise WriteError(
                "QC-WRITE-008", f"cannot be a file of an artefact: {reason}", file=name
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
        """Write a file of UTF-8 text, as it is."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, value: Any) -> None:
        """Write JSON, indented by two, keys in their order; NaN and infinity are refused."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def copy(self, name: str, source: Path) -> None:
        """Copy a file (links followed), read once and hashed on the way.

        Raises:
            InputError: ``QC-READ-001`` when the source cannot be read.
            WriteError: as `stream`.
        """
        with reading(source), open(_open_plain(source), "rb", buffering=0) as file:
            buffer = memoryview(bytearray(min(CHUNK, max(os.fstat(file.fileno()).st_size, 1))))
            with self.stream(name) as out:
                while count := file.readinto(buffer):
                    out.write(buffer[:count])


def _open_plain(path: Path) -> int:
    """A descriptor of a plain file; a pipe does not block and a folder is an error."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return fd


def check_target(path: Path | str, *, overwrite: bool = False, need_bytes: int = 0) -> Path:
    """Whether an artefact could be published here; changes nothing, so call it early.

    Args:
        path: the target, absent or an empty folder.
        overwrite: also accept a folder that holds an artefact of ours.
        need_bytes: free space that must be there.

    Returns:
        The target with links resolved.

    Raises:
        WriteError: ``QC-WRITE-001``, ``-002``, ``-005``, ``-007``.
    """
    shown, target = Path(path), Path(os.path.realpath(path))
    with writing(shown):
        if target.is_dir():
            _check_folder(shown, target, overwrite)
        elif os.path.lexists(target):
            raise WriteError("QC-WRITE-002", "is a file", file=shown, expected="a new folder")
        parent = target.parent
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            raise WriteError("QC-WRITE-002", f"{parent} is not a folder", file=shown)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise write_error(OSError(errno.EACCES, "not permitted"), parent)
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
    fix = "name a new folder, or empty this one"
    if not overwrite:
        raise WriteError("QC-WRITE-001", "is not empty", file=shown, fix=fix)
    if not (target / MANIFEST).is_file():
        what = f"is not empty and holds no {MANIFEST}, so it is not ours to replace"
        raise WriteError("QC-WRITE-001", what, file=shown, fix=fix)


@contextmanager
def publish(
    path: Path | str, kind: str = "adapter", overwrite: bool = False, *, need_bytes: int = 0
) -> Iterator[Writer]:
    """Write an artefact: the target appears, complete and durable, when the block ends.

    Args:
        path: the target: absent (missing parents are made) or an empty folder.
        kind: what the manifest calls it.
        overwrite: replace an artefact of ours that stands there. A kill between the two
            renames leaves the target absent and the old one beside it, as ``.NAME.old-*``.
        need_bytes: free space to ask for before anything is written.

    Yields:
        The `Writer`.

    Raises:
        WriteError: ``QC-WRITE-*``. After this or any other exception the target is as before.
    """
    shown = Path(path)
    target = check_target(path, overwrite=overwrite, need_bytes=need_bytes)
    with writing(shown.parent):
        made = make_folders(target.parent)
    temporary = target.parent / f".{target.name[:100]}.partial-{secrets.token_hex(8)}"
    held = -1
    done = False
    try:
        with writing(shown):
            _sweep(target)
            os.mkdir(temporary)
            held = _hold(temporary)
        writer = Writer(temporary, shown)
        yield writer
        _finish(writer, temporary, kind, shown)
        _install(temporary, target, shown, overwrite)
        done = True
        with suppress(OSError):  # the new one stands; what is left is swept by the next publish
            _sweep(target)
    finally:
        if held >= 0:
            os.close(held)
        if not done:
            with suppress(OSError):
                delete(temporary)
            drop_folders(made)


def _finish(writer: Writer, temporary: Path, kind: str, shown: Path) -> None:
    """Write the manifest, make all names durable."""
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
    """Give the finished folder its name; on failure the target is as it was."""
    aside: Path | None = None
    was_empty_folder = False
    renamed = False
    try:
        if overwrite and (target / MANIFEST).is_file():
            aside = target.parent / f".{target.name[:100]}.old-{secrets.token_hex(8)}"
            os.rename(target, aside)
        else:
            was_empty_folder = target.is_dir()
        os.rename(temporary, target)  # replaces an empty folder; a full one is ENOTEMPTY
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
            what = "was filled by someone else meanwhile"
            raise WriteError("QC-WRITE-001", what, file=shown, fix="name a new folder") from error
        raise write_error(error, shown) from error


def _hold(folder: Path) -> int:
    """Lock a folder of ours for as long as this process lives, so that nobody sweeps it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with suppress(OSError):  # a file system without locks: then nothing is swept either
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def _sweep(target: Path) -> None:
    """Delete what killed runs, and the one just replaced, left beside the target.

    What still has an owner stays, and so does an old one while no new one stands.
    """
    stem = f".{target.name[:100]}."
    for entry in list(os.scandir(target.parent)):
        old = entry.name.startswith(f"{stem}old-") and (target / MANIFEST).is_file()
        if not (entry.name.startswith(f"{stem}partial-") or old) or entry.is_symlink():
            continue
        with suppress(OSError):
            fd = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                delete(Path(entry.path))
            finally:
                os.close(fd)
