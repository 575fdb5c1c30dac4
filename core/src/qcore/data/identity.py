"""The identity of data files: whether a file is the one that was read before.

This file decides what makes two files the same: equal size, time of change and inode, which cost
nothing to compare, or equal SHA-256. The digest of several files is one of their digests in order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .source import Source
from .streams import opened

_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """A file as it was when it was read.

    Attributes:
        path: the file, every link followed.
        size: bytes.
        mtime_ns: time of the last change, in ns since the epoch.
        inode: number of the file in its file system.
        sha256: hex digest of its bytes; empty if it was not computed.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int
    sha256: str = ""

    def looks_like(self, other: FileIdentity) -> bool:
        """Whether size, time and inode are equal: then the file is not hashed again."""
        return (self.size, self.mtime_ns, self.inode) == (other.size, other.mtime_ns, other.inode)

    def as_json(self) -> dict[str, Any]:
        """The fields, for a store or a manifest."""
        return {
            "path": self.path,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "inode": self.inode,
            "sha256": self.sha256,
        }


def identity(path: Path, *, hashed: bool = True) -> FileIdentity:
    """Identify a file.

    Args:
        path: the file.
        hashed: compute its SHA-256.

    Raises:
        InputError: ``QC-DATA-001`` it cannot be read.
    """
    with opened(path) as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256()
        while hashed and (block := file.read(_BLOCK)):
            digest.update(block)
    return FileIdentity(
        path=os.path.realpath(path),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        sha256=digest.hexdigest() if hashed else "",
    )


def identities(
    sources: Iterable[Source], known: Sequence[FileIdentity] = (), *, verify: bool = False
) -> tuple[FileIdentity, ...]:
    """Identify all files of all sources, in order.

    Args:
        sources: the sources.
        known: identities of an earlier run; a file that looks like its earlier one keeps its
            digest.
        verify: hash every file again.
    """
    earlier = {each.path: each for each in known if each.sha256}
    found = []
    for source in sources:
        for path in source.files:
            now = identity(path, hashed=False)
            before = earlier.get(now.path)
            if verify or before is None or not now.looks_like(before):
                before = identity(path)
            found.append(before)
    return tuple(found)


def digest_of(files: Sequence[FileIdentity]) -> str:
    """The hex digest of files in order; that of a single file is its own SHA-256."""
    if len(files) == 1:
        return files[0].sha256
    return hashlib.sha256("".join(f"{file.sha256}\n" for file in files).encode()).hexdigest()
