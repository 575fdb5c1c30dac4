"""Protocol of a media reader (images, videos): payloads, positions, and `RowError` for a bad row.

This file decides the protocol: what core hands to a reader (`Payload`), what it gets back
(`Medium`, `Placed`, the batch of a tower), and how a reader refuses one row (`RowError`). Where
the bytes of a row may lie and what is checked before they are read is decided by
`qcore.data.media_files`; what the bytes mean, by the reader. It imports no torch.

Shapes: n embeddings that the tower makes of the media of one pack.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from .blocks import Media


class RowError(Exception):
    """A fault in one row of a data file; core adds the file and the line.

    A reader of media raises it for bytes that it cannot read. The row is refused and reported, and
    checking goes on with the next one.

    Args:
        code: stable code.
        what: the statement.
        at: path inside the row, ``messages[3].content``.
        found: what was there.
        expected: what should have been there.
        fix: one edit that mends it.
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        at: str = "",
        found: object | None = None,
        expected: object | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.at = at
        self.found = found
        self.expected = expected
        self.fix = fix

    def within(self, at: str) -> RowError:
        """The same, of something that lies at `at` in the row."""
        self.at = f"{at}.{self.at}" if self.at else at
        return self

    def error(self, path: Path | None, line: int) -> InputError:
        """The user's error: file, line and field."""
        return InputError(
            self.code,
            self.what,
            file=path,
            field=f"line {line}, {self.at}" if self.at else f"line {line}",
            found=self.found,
            expected=self.expected,
            fix=self.fix,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The bytes of one part of a row, found and checked.

    Attributes:
        kind: kind of media.
        sha256: hex digest of the bytes; of a list of frames, a digest of theirs.
        path: the file, every link followed; ``None`` if the row holds the bytes.
        data: the bytes; ``None`` if a file holds them.
        frames: the frames of a part that lists several files, instead of `path` and `data`.
        options: the part's other keys.
    """

    kind: str
    sha256: str
    path: Path | None = None
    data: bytes | None = None
    frames: tuple[Payload, ...] = ()
    options: Mapping[str, Any]

    def open(self) -> BinaryIO:
        """Open the bytes for reading.

        Raises:
            RowError: ``QC-DATA-006``: the part lists several files, and the reader wants one.
        """
        if self.frames:
            raise RowError(
                "QC-DATA-006",
                f"is a list of files, but a part of type {self.kind} has one file",
                at=self.kind,
                found=f"a list of {len(self.frames)}",
                expected="one path or data URL",
                fix="write a part for each file",
            )
        if self.path is None:
            return io.BytesIO(self.data or b"")
        return self.path.open("rb")


class Medium(Protocol):
    """One payload, processed: small itself, its values wait in a cache."""

    @property
    def kind(self) -> str:
        """Type of the part."""
        ...

    @property
    def digest(self) -> str:
        """Of its bytes and of how they were processed: equal for equal values."""
        ...

    @property
    def tokens(self) -> int:
        """Embeddings that the tower makes of it."""
        ...

    @property
    def units(self) -> int:
        """Rows of values that the tower computes."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where the media of a row lie among its tokens.

    Attributes:
        where: tokens whose embeddings are the tower's, in the order of its outputs.
        positions: of every token, along each axis of the rotary embedding.
    """

    where: array[int]
    positions: tuple[array[int], ...]


class MediaReader(Protocol):
    """A modality's reader, made from the checkpoint's processor files."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Types of content parts that it reads; such a part has a key of that name."""
        ...

    @property
    def keys(self) -> tuple[str, ...]:
        """Further keys that such a part may have, beside ``type`` and ``sha256``."""
        ...

    @property
    def control(self) -> tuple[str, ...]:
        """Tokens that stand for media: never a label, and no text of a row may hold one."""
        ...

    def read(self, payload: Payload) -> Medium:
        """Decode and process a payload, or find it in the cache. Raises `RowError`."""
        ...

    def expand(self, text: str, media: Sequence[Medium]) -> str:
        """A rendered text with every placeholder as long as its medium.

        Raises:
            RowError: another number of placeholders than of media, or in another order.
        """
        ...

    def place(self, ids: Sequence[int], media: Sequence[Medium]) -> Placed:
        """Where the media lie in the token ids of an expanded text."""
        ...

    def batch(self, media: Sequence[Medium], where: Tensor) -> Media:
        """What the tower reads of a pack.

        Args:
            media: of all its rows, in order.
            where: ``[n]`` int64, as `Media.where`.
        """
        ...
