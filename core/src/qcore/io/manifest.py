"""MANIFEST.json: what an artefact holds, and whether it still does.

This file decides the manifest's format (version 1) and what `verify` calls a problem: a file
missing, extra, of another size or content, a link, a name that leaves the folder, a manifest
that was changed. It writes nothing.

Format: ``format_version``, ``kind``, ``created`` (UTC), ``qcore`` (version), ``files``
(name -> ``size``, ``sha256``), ``meta`` (the writer's own mapping) and ``manifest_sha256``,
which is the SHA-256 of the file's own bytes with that value set to 64 zeros.

Codes: ``QC-MANIFEST-001`` no artefact folder, ``-002`` no manifest, ``-003`` manifest broken
or changed, ``-004`` a later format.
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
    """What MANIFEST.json says.

    Attributes:
        kind: ``adapter``, ``model``, ``checkpoint``, ...
        created: UTC time, ISO 8601.
        qcore: version that wrote it.
        files: by name, ``/`` between folder and file.
        meta: what the writer added.
    """

    kind: str
    created: str
    qcore: str
    files: Mapping[str, FileEntry]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's bytes, its own digest included."""
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
    """What `verify` found.

    Attributes:
        ok: no problem.
        kind: the manifest's kind; empty where it cannot be read.
        files: how many files the manifest names.
        size: their bytes.
        problems: one line each.
        meta: the manifest's meta.
    """

    ok: bool
    kind: str
    files: int
    size: int
    problems: list[str]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore verify --json``."""
        return {"ok": self.ok, "files": self.files, "problems": self.problems}


def unsafe(name: str) -> str | None:
    """Why a file of this name may not be part of an artefact; ``None`` where it may.

    Allowed: ``file`` and ``folder/file``, names that every file system takes.
    """
    return "the manifest's own name" if name == MANIFEST else name_problem(name, depth=2)


def read_manifest(path: Path | str) -> Manifest:
    """Read the manifest of an artefact folder; does not look at the other files.

    Raises:
        InputError: ``QC-MANIFEST-*``.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError("QC-MANIFEST-001", "is not a folder", file=folder)
    file = folder / MANIFEST
    if not os.path.lexists(file):
        fix = "name a folder that qcore wrote"
        raise InputError("QC-MANIFEST-002", f"holds no {MANIFEST}", file=folder, fix=fix)
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
            "is of a later format",
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
    """Check a folder against its manifest, byte by byte.

    Args:
        path: the artefact folder.
        progress: called with bytes read so far and bytes in all.

    Raises:
        InputError: ``QC-MANIFEST-001`` when there is no such folder. Everything else is a
            problem in the report.
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        if error.code == "QC-MANIFEST-001":
            raise
        return Report(ok=False, kind="", files=0, size=0, problems=[error.message])
    problems: list[str] = []
    found = dict(_walk(folder, "", problems))
    total = sum(entry.size for entry in manifest.files.values())
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for name, entry in sorted(manifest.files.items()):
        if name not in found:
            problems.append(f"{name}: missing")
        elif found[name] != entry.size:
            problems.append(f"{name}: {found[name]} bytes, expected {entry.size}")
        else:
            problems += _content(folder / name, name, entry, tick)
    problems += [f"{name}: not in the manifest" for name in sorted(found.keys() - manifest.files)]
    return Report(
        ok=not problems,
        kind=manifest.kind,
        files=len(manifest.files),
        size=total,
        problems=problems,
        meta=manifest.meta,
    )


def _walk(folder: Path, prefix: str, problems: list[str]) -> Iterator[tuple[str, int]]:
    """Name and size of every plain file; links, pipes and empty folders are problems."""
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
    """Problems with the content of one file whose size is right."""
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
