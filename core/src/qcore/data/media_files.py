"""Media in rows: where their bytes may lie, and what a modality's reader makes of them.

This file decides how a content part names its bytes (a path relative to the data file, or a data
URL: nothing is fetched) and what is checked before anything decodes them: the file is there, lies
within the data file's folder, is not too large and has the digest that the row states. What the
bytes mean is the reader's (`MediaReader`), which a plugin brings with its `Modality`;
`qcore.data.content` finds media in rows. It imports no torch.

Codes: ``QC-MEDIA-001`` neither a relative path nor a data URL, ``-002`` missing or unreadable,
``-003`` not a regular file, ``-004`` outside of the folder, ``-005`` too large, ``-006`` another
digest than stated.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api.media import MediaReader, Medium, Payload, RowError
from ..io.safe_path import inside, unnameable
from .jsonl import MAX_LINE

LARGEST = 2 << 30  #: bytes of one file; a data URL is bounded by its line
_BLOCK = 1 << 20
#: A scheme, as RFC 3986 has it; a file that is called so is named with ``./`` before it.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_WANTED = "a path relative to the data file, or data:TYPE;base64,..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A part of a row that names its bytes, not looked at yet.

    Attributes:
        kind: the part's type.
        at: its place in the row, ``messages[1].content[0]``.
        given: a path, or a data URL with the bytes themselves.
        sha256: lower-case hex digest that the row states.
        options: its other keys, which are the reader's.
    """

    kind: str
    at: str
    given: str
    sha256: str | None = None
    options: Mapping[str, Any]


class Finder:
    """The bytes that rows of one data file refer to; each file is read for its digest once.

    Args:
        folder: of the data file; nothing outside of it is opened.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[tuple[str, int, int], str] = {}

    def read(self, part: Reference, reader: MediaReader) -> Medium:
        """Find the bytes of a part and have them read.

        Raises:
            RowError: as `payload` and `MediaReader.read`, with the part's place and its file.
        """
        try:
            payload = self.payload(part)
            try:
                return reader.read(payload)
            except RowError as bad:
                if payload.path is not None and not bad.at:  # it is about the bytes
                    told = "" if bad.found is None else f": {bad.found}"
                    bad.found = f"{_shown(part.given)}{told}"
                raise
        except RowError as bad:
            raise bad.within(part.at) from None

    def payload(self, part: Reference) -> Payload:
        """The bytes of a part, found and checked in constant memory.

        Raises:
            RowError: ``QC-MEDIA-001`` to ``-006``.
        """
        path = data = None
        if part.given[:5].lower() == "data:":
            data = _decoded(part.given)
            digest = hashlib.sha256(data).hexdigest()
        else:
            path = self._path(part.given)
            digest = self._digest(path, part.given)
        if part.sha256 is not None and part.sha256 != digest:
            raise RowError(
                "QC-MEDIA-006",
                "does not match its sha256",
                found=digest,
                expected=part.sha256,
                fix="restore the file, or correct the digest",
            )
        return Payload(kind=part.kind, sha256=digest, path=path, data=data, options=part.options)

    def _path(self, given: str) -> Path:
        """Resolve a relative path, following links, without opening anything."""
        _check_form(given)
        real = inside(self._folder, given)
        if real is None:
            raise RowError(
                "QC-MEDIA-004",
                "leads outside the folder of the data file",
                found=_shown(given),
                expected="a file in the folder or below it, links followed",
                fix="put the file there",
            )
        return real

    def _digest(self, path: Path, given: str) -> str:
        """Digest of a regular file; other files are not opened, because a pipe may never end."""
        try:
            _check_regular(path.lstat().st_mode, given)
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(path, flags), "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                _check_regular(status.st_mode, given)
                if status.st_size > LARGEST:
                    raise RowError(
                        "QC-MEDIA-005",
                        "is too large",
                        found=f"{_shown(given)} of {status.st_size} bytes",
                        expected=f"at most {LARGEST}",
                    )
                key = (str(path), status.st_mtime_ns, status.st_size)
                if key not in self._digests:
                    digest = hashlib.sha256()
                    while block := file.read(_BLOCK):
                        digest.update(block)
                    self._digests[key] = digest.hexdigest()
                return self._digests[key]
        except OSError as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            raise RowError(
                "QC-MEDIA-002",
                "is not there" if missing else "cannot be read",
                found=f"{_shown(given)}: {error.strerror or error}",
                expected="a file, by its path relative to the data file",
            ) from None


def _check_form(given: str) -> None:
    """Refuse anything but a relative path."""
    what, fix = "", "write the relative path of a file"
    if not given.strip():
        what = "is empty"
    elif _SCHEME.match(given):
        what = "is not a relative path; nothing is fetched"
        fix = "put the file beside the data file; before a name with a colon write ./"
    elif given.startswith(("/", "~")):
        what, fix = "is not a relative path", "write it relative to the data file"
    elif "\\" in given:
        what, fix = "has a backslash", "write / between folders"
    elif unnameable(given):
        what = "has a control character or a lone surrogate"
    if what:
        raise RowError("QC-MEDIA-001", what, found=_shown(given), expected=_WANTED, fix=fix)


def _check_regular(mode: int, given: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISLNK, "a link that leads back to itself"),
    )
    kind = next((name for is_kind, name in kinds if is_kind(mode)), "a device")
    raise RowError(
        "QC-MEDIA-003",
        "is not a regular file",
        found=f"{_shown(given)}: {kind}",
        expected="a file that holds the bytes",
    )


def _decoded(given: str) -> bytes:
    """Decode a data URL strictly; a lenient decoder would drop invalid characters."""
    head, comma, body = given.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowError(
            "QC-MEDIA-001",
            "is a data URL that is not in base64",
            found=_shown(given),
            expected=_WANTED,
        )
    try:
        return binascii.a2b_base64(body, strict_mode=True)
    except ValueError as error:
        raise RowError(
            "QC-MEDIA-001",
            "is a data URL that does not decode",
            found=f"{_shown(given)}: {error}",
            expected=_WANTED,
            fix=f"write all of it, or a file's path when it is beyond a line's {MAX_LINE} bytes",
        ) from None


def _shown(given: str) -> str:
    return repr(given if len(given) <= 80 else f"{given[:77]}...")
