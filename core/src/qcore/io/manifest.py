r"""MANIFEST.json: size and SHA-256 of each file in a result folder.

This file decides the manifest's format (version 1). `qcore.io.folder_check` decides what is a fault
of a folder. It writes nothing.

Format: ``format_version``, ``kind``, ``created`` (UTC), ``qcore`` (version), ``files``
(name -> ``size``, ``sha256``, and for a JSON file that people edit ``fields`` and ``editable``),
``meta`` (a mapping of the writer) and ``manifest_sha256``, the SHA-256 of the file's bytes with
that value set to 64 zeros. Line ends that git rewrote (``\r\n``) are read as ``\n``.

Codes: ``QC-MANIFEST-001`` not a folder, ``-002`` no manifest, ``-003`` the manifest is broken or
was changed, ``-004`` a later format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import InputError
from . import strict_json
from .atomic import reading
from .leftovers import MANIFEST as MANIFEST
from .safe_path import dangling_target, name_problem, stored_file

FORMAT_VERSION: Final = 1
MAX_BYTES: Final = 64 << 20
_ZEROS: Final = "0" * 64
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_KEYS: Final = frozenset(
    ("format_version", "kind", "created", "qcore", "files", "meta", "manifest_sha256")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file.

    Attributes:
        size: in bytes.
        sha256: of its bytes.
        fields: content of a JSON file whose fields decide instead of its bytes; ``None`` for a
            file whose bytes decide.
        editable: names of fields that may be edited or added.
    """

    size: int
    sha256: str
    fields: Mapping[str, Any] | None = None
    editable: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the entry as the manifest holds it."""
        entry: dict[str, Any] = {"size": self.size, "sha256": self.sha256}
        if self.fields is not None:
            entry |= {"fields": dict(self.fields), "editable": list(self.editable)}
        return entry


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
            "files": {name: entry.as_json() for name, entry in sorted(self.files.items())},
            "meta": self.meta,
            "manifest_sha256": _ZEROS,
        }
        text = json.dumps(payload, indent=2, allow_nan=False) + "\n"
        head, _, tail = text.rpartition(_ZEROS)
        digest = hashlib.sha256(text.encode("ascii")).hexdigest()
        return f"{head}{digest}{tail}".encode("ascii")


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
        raise InputError(
            "QC-MANIFEST-001", "is not a folder", file=folder,
            fix="name a folder that qcore wrote",
        )  # fmt: skip
    file = folder / MANIFEST
    if not os.path.lexists(file):
        fix = "name a folder that qcore wrote"
        raise InputError("QC-MANIFEST-002", f"has no {MANIFEST}", file=folder, fix=fix)
    real = stored_file(folder, MANIFEST)
    if real is None or not real.is_file():
        target = dangling_target(file)
        what = (
            "is not a plain file" if target is None else f"is a link to {target}, which is absent"
        )
        raise InputError("QC-MANIFEST-003", what, file=file)
    with reading(file), real.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _broken(file, "is larger than 64 MiB")
    return _parse(data.replace(b"\r\n", b"\n"), file)


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
        fields, editable = entry.get("fields"), entry.get("editable", [])
        if not isinstance(fields, dict | None) or not isinstance(editable, list):
            raise _broken(file, f"has a value of the wrong type for {name}")
        entries[name] = FileEntry(
            size=size, sha256=sha256, fields=fields, editable=tuple(map(str, editable))
        )
    return entries


def _broken(file: Path, what: str) -> InputError:
    return InputError("QC-MANIFEST-003", what, file=file, fix="restore the folder from its source")
