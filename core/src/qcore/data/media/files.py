"""Media in rows: where their bytes are, and what a modality's reader makes of them.

This file decides how a content part names its bytes (a path, a data URL, or the bytes themselves:
nothing is fetched) and what is checked before they are decoded: the file exists, is not too large
and has the digest that the row states. `qcore.data.media.paths` decides where a file may lie. The
`MediaReader` that a plugin provides with its `Modality` decodes the bytes; `qcore.data.content`
finds media in rows. It imports no torch.

Codes: ``QC-MEDIA-001`` neither a path nor a data URL, ``-002`` missing or unreadable, ``-003`` not
a regular file, ``-004`` outside of the folders, ``-005`` too large, ``-006`` another digest than
stated.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ...api.media import BytesSource, MediaReader, Medium, Payload, RowError
from ..sources.jsonl import MAX_LINE
from .paths import ROOT, WANTED, Folders, shown

LARGEST = 2 << 30  #: bytes of one file; a data URL is bounded by its line
_BLOCK = 1 << 20
#: A path or data URL, the bytes themselves, or the frames of one medium.
Given: TypeAlias = str | bytes | tuple[str | bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A part of a row that names its bytes, before they are looked at.

    Attributes:
        kind: kind of media.
        at: its place in the row, ``messages[1].content[0]``.
        given: a path, a data URL, the bytes themselves, or a list of them: the frames.
        sha256: lower-case hex digest that the row states.
        options: its other keys, which are the reader's.
    """

    kind: str
    at: str
    given: Given
    sha256: str | None = None
    options: Mapping[str, Any]


class Finder:
    """The bytes that rows of one data file refer to; each file is read for its digest once.

    Args:
        folder: of the data file.
        media_root: folder declared by the user, below which absolute paths may lie.
    """

    def __init__(self, folder: Path, media_root: Path | None = None) -> None:
        self._folders = Folders(folder, media_root)
        self._digests: dict[tuple[str, int, int, int], str] = {}

    def read(
        self, part: Reference, reader: MediaReader, origin: BytesSource | None = None
    ) -> Medium:
        """Find the bytes of a part and have them read; see `read_payload`."""
        return self.read_payload(part, reader, origin)[0]

    def read_payload(
        self, part: Reference, reader: MediaReader, origin: BytesSource | None = None
    ) -> tuple[Medium, Payload]:
        """Find the bytes of a part and have them read.

        Args:
            part: the part.
            reader: the reader of its kind.
            origin: where to read bytes in the row again, as `qcore.data.sources.row_bytes` has it.

        Returns:
            What the reader made of them, and the payload without the bytes of the row.

        Raises:
            RowError: as `payload` and `MediaReader.read`, with the part's place and its file.
        """
        try:
            payload = self.payload(part, origin)
            try:
                return reader.read(payload), payload.without_data()
            except RowError as bad:
                if isinstance(part.given, str) and payload.path is not None and not bad.at:
                    reason = "" if bad.found is None else f": {bad.found}"
                    bad.found = f"{shown(part.given)}{reason}"  # it is about the bytes
                raise
        except RowError as bad:
            raise bad.within(part.at) from None

    def payload(self, part: Reference, origin: BytesSource | None = None) -> Payload:
        """The bytes of a part, found and checked in constant memory.

        Args:
            part: the part.
            origin: where to read bytes in the row again.

        Raises:
            RowError: ``QC-MEDIA-001`` to ``-006``.
        """
        if isinstance(part.given, tuple):
            return self._listed(part, part.given, origin)
        payload = self._single(part.kind, part.given, part.options, origin)
        if part.sha256 is not None and part.sha256 != payload.sha256:
            raise RowError(
                "QC-MEDIA-006",
                "does not match its sha256",
                found=payload.sha256,
                expected=part.sha256,
                fix="restore the file, or correct the digest",
            )
        return payload

    def _listed(
        self, part: Reference, given: tuple[str | bytes, ...], origin: BytesSource | None
    ) -> Payload:
        """A medium of several files; its digest covers theirs, in order."""
        frames: list[Payload] = []
        for index, one in enumerate(given):
            try:
                frames.append(self._single(part.kind, one, {}, origin))
            except RowError as bad:
                raise bad.within(f"{part.kind}[{index}]") from None
        digest = hashlib.sha256(b"frames\n")
        for frame in frames:
            digest.update(f"{frame.sha256}\n".encode())
        return Payload(
            kind=part.kind,
            sha256=digest.hexdigest(),
            frames=tuple(frames),
            options=part.options,
        )

    def _single(
        self,
        kind: str,
        given: str | bytes,
        options: Mapping[str, Any],
        origin: BytesSource | None,
    ) -> Payload:
        """One file, data URL, or the bytes of a row."""
        path = data = None
        if isinstance(given, bytes):
            data = given
        elif given[:5].lower() == "data:":
            data = _decoded(given)
        if data is not None:
            digest = hashlib.sha256(data).hexdigest()
        else:
            assert isinstance(given, str)
            path = self._folders.find(given)
            digest = self._digest(path, given)
            origin = None
        return Payload(
            kind=kind, sha256=digest, path=path, data=data, origin=origin, options=options
        )

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
                        found=f"{shown(given)} of {status.st_size} bytes",
                        expected=f"at most {LARGEST}",
                    )
                key = (str(path), status.st_ino, status.st_mtime_ns, status.st_size)
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
                found=f"{shown(given)}: {error.strerror or error}",
                expected="a file, by its path relative to the data file",
                fix=f"put the file there, or {ROOT}" if missing else "check its permissions",
            ) from None


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
        found=f"{shown(given)}: {kind}",
        expected="a file that holds the bytes",
    )


def _decoded(given: str) -> bytes:
    """Decode a data URL strictly; a lenient decoder would drop invalid characters."""
    head, comma, body = given.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowError(
            "QC-MEDIA-001",
            "is a data URL that is not in base64",
            found=shown(given),
            expected=WANTED,
        )
    try:
        return binascii.a2b_base64(body, strict_mode=True)
    except ValueError as error:
        raise RowError(
            "QC-MEDIA-001",
            "is a data URL that does not decode",
            found=f"{shown(given)}: {error}",
            expected=WANTED,
            fix=f"write all of it, or a file's path when it is beyond a line's {MAX_LINE} bytes",
        ) from None
