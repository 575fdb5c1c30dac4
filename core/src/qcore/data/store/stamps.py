"""By what a file is recognized that was read before: size, time and inode, or its content.

This file decides when a file counts as unchanged. A file with the same size, modification time and
inode is unchanged, unless its status changed since or it was modified just before it was read: then
it is hashed, because a time stamp may be coarser than two writes. A file of the same size with
another time or inode (a copy, a checkout) is hashed too, because that is faster than rendering it
again.

Code: ``QC-DATA-081`` a data file changed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ...errors import InputError
from ...io.atomic import CHUNK, reading
from ...reporting import Advance, Reporter

_COARSE: Final = 2_000_000_000  #: nanoseconds; the coarsest time stamps, those of FAT
_LONG: Final = 256 << 20  #: bytes that take about a second to hash
GONE: Final = "no such file"
OTHER: Final = "other content"


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it was when it was read.

    Attributes:
        path: the file.
        size: in bytes.
        mtime_ns: its modification time.
        inode: number of its inode.
        ctime_ns: time of the last change of its status.
        read_ns: when the stamp was taken.
        sha256: hex digest of its content; empty: not known yet.
    """

    path: Path
    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int
    read_ns: int
    sha256: str = ""

    @classmethod
    def of(cls, path: Path, sha256: str = "") -> Stamp:
        """The stamp of a file now.

        Raises:
            OSError: the file does not exist.
        """
        now, file = time.time_ns(), os.stat(path)
        return cls(path, file.st_size, file.st_mtime_ns, file.st_ino, file.st_ctime_ns, now, sha256)

    def matches(self, now: Stamp) -> bool:
        """Whether size, modification time, inode and time of status are the same."""
        return _numbers(self) == _numbers(now)

    @property
    def settled(self) -> bool:
        """Whether a write after the stamp was taken has another modification time."""
        return self.read_ns - self.mtime_ns > _COARSE

    def as_json(self) -> list[Any]:
        """The path, the numbers and the digest."""
        return [str(self.path), *_numbers(self), self.read_ns, self.sha256]

    @classmethod
    def of_json(cls, value: Sequence[Any]) -> Stamp:
        """The stamp of its `as_json`."""
        path, size, mtime_ns, inode, ctime_ns, read_ns, sha256 = value
        return cls(Path(path), size, mtime_ns, inode, ctime_ns, read_ns, sha256)


class Changed(Exception):
    """A file is not the one that was read.

    Args:
        path: the file.
        reason: `GONE` or `OTHER`.
        hidden: whether size, time and inode are still the same.
    """

    def __init__(self, path: Path, reason: str, *, hidden: bool = False) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.hidden = path, reason, hidden

    def error(self, fix: str, *, when: str = "after its rows were read") -> InputError:
        """The user's error."""
        how = ", but its size and time did not" if self.hidden else ""
        return InputError(
            "QC-DATA-081",
            f"changed {when}{how}",
            file=self.path,
            found=self.reason,
            fix=fix,
        )


def taken(paths: Iterable[Path]) -> list[Stamp]:
    """Stamps of the data files of a run, before they are read; digests follow.

    A file that cannot be reached has no stamp: reading it is an error of its own.
    """
    stamps = []
    for path in dict.fromkeys(paths):
        with suppress(OSError):
            stamps.append(Stamp.of(path))
    return stamps


def rechecked(stamps: Sequence[Stamp], reporter: Reporter, *, content: bool = False) -> list[Stamp]:
    """The stamps of the same files now.

    Args:
        stamps: with digests.
        reporter: receives progress where hashing takes over a second.
        content: hash all files, also those that are recognized.

    Raises:
        Changed: a file has other content, or is gone.
    """
    now: list[Stamp] = []
    for stamp in stamps:
        try:
            now.append(Stamp.of(stamp.path, stamp.sha256))
        except OSError:
            raise Changed(stamp.path, GONE) from None
        if now[-1].size != stamp.size:
            raise Changed(stamp.path, OTHER)
    known = [old.matches(new) for old, new in zip(stamps, now, strict=True)]
    unsure = [
        new for old, new, same in zip(stamps, now, known, strict=True)
        if content or not same or not old.settled
    ]  # fmt: skip
    digests = hashed([stamp.path for stamp in unsure], reporter)
    for stamp, digest in zip(unsure, digests, strict=True):
        if digest != stamp.sha256:
            raise Changed(stamp.path, OTHER, hidden=known[now.index(stamp)])
    return now


def hashed(paths: Sequence[Path], reporter: Reporter) -> list[str]:
    """SHA-256 of files, with a line of progress where that takes over a second.

    Raises:
        InputError: ``QC-READ-001``.
    """
    total = sum(path.stat().st_size for path in paths if path.exists())
    if total < _LONG:
        return [_hash(path, lambda _: None) for path in paths]
    with reporter.progress("hashing the data", total, "bytes") as advance:
        return [_hash(path, advance) for path in paths]


def _hash(path: Path, advance: Advance) -> str:
    digest = hashlib.sha256()
    with reading(path), path.open("rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            advance(count)
    return digest.hexdigest()


def with_digests(
    stamps: Sequence[Stamp], known: dict[Path, str], reporter: Reporter
) -> list[Stamp]:
    """The stamps with the digests of their files, once these have been read.

    Args:
        stamps: as they were before the files were read.
        known: digests of files that were hashed while they were read.
        reporter: receives progress.

    Raises:
        Changed: a file changed while it was read.
    """
    unknown = [stamp.path for stamp in stamps if stamp.path not in known]
    known = known | dict(zip(unknown, hashed(unknown, reporter), strict=True))
    for stamp in stamps:
        try:
            same = stamp.matches(Stamp.of(stamp.path))
        except OSError:
            raise Changed(stamp.path, GONE) from None
        if not same:
            raise Changed(stamp.path, OTHER)
    return [replace(stamp, sha256=known[stamp.path]) for stamp in stamps]


def _numbers(stamp: Stamp) -> tuple[int, int, int, int]:
    return stamp.size, stamp.mtime_ns, stamp.inode, stamp.ctime_ns
