"""MANIFEST.json: size and SHA-256 of each file in a result folder, and `verify` against them.

This file decides the manifest's format (version 1) and what `verify` reports as a problem: a
missing or extra file, a different size or content, a link, a name that leaves the folder, a changed
manifest. It writes nothing.

Format: ``format_version``, ``kind``, ``created`` (UTC), ``qcore`` (version), ``files``
(name -> ``size``, ``sha256``), ``meta`` (a mapping of the writer) and ``manifest_sha256``, the
SHA-256 of the file's bytes with that value set to 64 zeros.

Codes: ``QC-MANIFEST-001`` not a folder, ``-002`` no manifest, ``-003`` the manifest is broken or
was changed, ``-004`` a later format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import InputError
from . import strict_json
from .atomic import CHUNK, reading
from .safe_path import name_problem

MANIFEST: Final = "MANIFEST.json"
FORMAT_VERSION: Final = 1
MAX_BYTES: Final = 64 << 20
_ZEROS: Final = "0" * 64
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_KEYS: Final = frozenset(
    ("format_version", "kind", "created", "qcore", "files", "meta", "manifest_sha256")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of MANIFEST.json.

    Attributes:
        kind: ``adapter``, ``model``, ``checkpoint``, ...
        created: UTC time in ISO 8601.
        qcore: version of qcore that wrote the artifact.
        files: the files by name, with ``/`` between folder and file.
        meta: values that the writer added.
    """

    kind: str
    created: str
    qcore: str
    files: Mapping[str, FileEntry]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the bytes of the file, including its own digest."""
        payload = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "created": self.created,
            "qcore": self.qcore,
            "files": {
                name: {"size": entry.size, "sha256": entry.sha256}
                for name, entry in sorted(self.files.items())
            },
            "meta": self.meta,
            "manifest_sha256": _ZEROS,
        }
        text = json.dumps(payload, indent=2, allow_nan=False) + "\n"
        head, _, tail = text.rpartition(_ZEROS)
        digest = hashlib.sha256(text.encode("ascii")).hexdigest()
        return f"{head}{digest}{tail}".encode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of `verify`.

    Attributes:
        ok: whether there are no problems.
        kind: the manifest's kind; empty if the manifest cannot be read.
        files: number of files in the manifest.
        size: their total size in bytes.
        problems: one line for each problem.
        meta: the manifest's meta mapping.
    """

    ok: bool
    kind: str
    files: int
    size: int
    problems: list[str]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the payload of ``qcore verify --json``."""
        return {"ok": self.ok, "files": self.files, "problems": self.problems}


def unsafe(name: str) -> str | None:
    """Return why a name is not allowed in an artifact; ``None`` if it is allowed.

    Allowed are ``file`` and ``folder/file``, with names that every file system supports.
    """
    return "the manifest's own name" if name == MANIFEST else name_problem(name, depth=2)


def read_manifest(path: Path | str) -> Manifest:
    """Read the manifest of an artifact folder, without checking the other files.

    Args:
        path: the artifact folder.

    Raises:
        InputError: ``QC-MANIFEST-001`` not a folder, ``-002`` no manifest, ``-003`` the manifest
            is broken or was changed, ``-004`` a later format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError("QC-MANIFEST-001", "is not a folder", file=folder)
    file = folder / MANIFEST
    if not os.path.lexists(file):
        fix = "name a folder that qcore wrote"
        raise InputError("QC-MANIFEST-002", f"has no {MANIFEST}", file=folder, fix=fix)
    if file.is_symlink() or not file.is_file():
        raise InputError("QC-MANIFEST-003", "is not a plain file", file=file)
    with reading(file), file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _broken(file, "is larger than 64 MiB")
    return _parse(data, file)


def _parse(data: bytes, file: Path) -> Manifest:
    try:
        payload = strict_json.loads(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise _broken(file, "is not JSON as qcore writes it") from error
    if not isinstance(payload, dict):
        raise _broken(file, "is not a mapping")
    version = payload.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise InputError(
            "QC-MANIFEST-004",
            "has a later format",
            file=file,
            found=version,
            expected=FORMAT_VERSION,
            fix="update qcore",
        )
    if version != FORMAT_VERSION or set(payload) != _KEYS:
        raise _broken(file, "has other keys than format version 1")
    digest = payload["manifest_sha256"]
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise _broken(file, "has no digest of itself")
    head, _, tail = data.rpartition(digest.encode())
    if hashlib.sha256(head + _ZEROS.encode() + tail).hexdigest() != digest:
        raise _broken(file, "was changed after it was written")
    words = [payload[key] for key in ("kind", "created", "qcore")]
    if not all(isinstance(word, str) for word in words) or not isinstance(payload["meta"], dict):
        raise _broken(file, "has a value of the wrong type")
    return Manifest(
        kind=words[0],
        created=words[1],
        qcore=words[2],
        files=_entries(payload["files"], file),
        meta=payload["meta"],
    )


def _entries(files: object, file: Path) -> dict[str, FileEntry]:
    if not isinstance(files, dict):
        raise _broken(file, "lists no files")
    entries = {}
    for name, entry in files.items():
        if (reason := unsafe(name)) is not None:
            raise InputError("QC-MANIFEST-003", f"names {name!r}: {reason}", file=file)
        size = entry.get("size") if isinstance(entry, dict) else None
        sha256 = entry.get("sha256") if isinstance(entry, dict) else None
        if type(size) is not int or size < 0 or not isinstance(sha256, str):
            raise _broken(file, f"has no size or digest for {name}")
        if not _SHA256.fullmatch(sha256):
            raise _broken(file, f"has no digest for {name}")
        entries[name] = FileEntry(size=size, sha256=sha256)
    return entries


def _broken(file: Path, what: str) -> InputError:
    return InputError("QC-MANIFEST-003", what, file=file, fix="restore the folder from its source")


def verify(path: Path | str, *, progress: Callable[[int, int], None] | None = None) -> Report:
    """Check every byte of a folder against its manifest.

    Args:
        path: the artifact folder.
        progress: called with the bytes read so far and the total bytes.

    Returns:
        The report; every fault but the one below is a problem in it.

    Raises:
        InputError: ``QC-MANIFEST-001`` the path is not a folder.
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        if error.code == "QC-MANIFEST-001":
            raise
        return Report(ok=False, kind="", files=0, size=0, problems=[error.message])
    problems: list[str] = []
    sizes = dict(_walk(folder, "", problems))
    total = sum(entry.size for entry in manifest.files.values())
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name, entry in sorted(manifest.files.items()):
        if name not in sizes:
            problems.append(f"{name}: missing")
        elif sizes[name] != entry.size:
            problems.append(f"{name}: {sizes[name]} bytes, expected {entry.size}")
        else:
            problems += _content(folder / name, name, entry, tick)
    problems += [f"{name}: not in the manifest" for name in sorted(sizes.keys() - manifest.files)]
    return Report(
        ok=not problems,
        kind=manifest.kind,
        files=len(manifest.files),
        size=total,
        problems=problems,
        meta=manifest.meta,
    )


def _walk(folder: Path, prefix: str, problems: list[str]) -> Iterator[tuple[str, int]]:
    """Yield name and size of every regular file; add links, pipes and empty folders to problems."""
    try:
        entries = sorted(os.scandir(folder), key=lambda e: e.name)
    except OSError as error:
        problems.append(f"{prefix or folder}: cannot be read: {error.strerror}")
        return
    if prefix and not entries:
        problems.append(f"{prefix}: an empty folder that is not in the manifest")
    for entry in entries:
        name = prefix + entry.name
        if entry.is_symlink():
            problems.append(f"{name}: a symbolic link")
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, f"{name}/", problems)
        elif not entry.is_file(follow_symlinks=False):
            problems.append(f"{name}: not a plain file")
        elif name != MANIFEST:
            yield name, entry.stat(follow_symlinks=False).st_size


def _content(path: Path, name: str, entry: FileEntry, tick: Callable[[int], None]) -> list[str]:
    """Return the problems with the content of a file that has the right size."""
    digest = hashlib.sha256()
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb", buffering=0) as stream:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return [f"{name}: not a plain file"]
            buffer = memoryview(bytearray(min(CHUNK, max(entry.size, 1))))
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                tick(count)
    except OSError as error:
        return [f"{name}: cannot be read: {error.strerror}"]
    return [] if digest.hexdigest() == entry.sha256 else [f"{name}: content differs (sha256)"]
