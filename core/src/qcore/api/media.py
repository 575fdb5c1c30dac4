"""Protocol of a media reader (images, videos): payloads, positions, and `RowError` for a bad row.

This file decides the protocol: what core hands to a reader (`Payload`), what it gets back
(`Medium`, `Placed`, the batch of a tower), and how a reader refuses one row (`RowError`). Where
the bytes of a row may lie and what is checked before they are read is decided by
`qcore.data.media.files`; what the bytes mean, by the reader. It imports no torch.

Shapes: n embeddings that the tower makes of the media of one pack.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..errors import InputError, restored

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

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (type(self), self.args, self.__dict__)

    def within(self, at: str) -> RowError:
        """The same, of something that lies at `at` in the row."""
        self.at = f"{at}.{self.at}" if self.at else at
        return self

    def error(self, path: Path | None, line: int, unit: str = "line") -> InputError:
        """The user's error: file, place and field.

        Args:
            path: the data file.
            line: number of the line, or of another unit.
            unit: what is counted: ``line``, ``element`` of a JSON array, ``row``.
        """
        place = f"{unit} {line}"
        return InputError(
            self.code,
            self.what,
            file=path,
            field=f"{place}, {self.at}" if self.at else place,
            found=self.found,
            expected=self.expected,
            fix=self.fix,
        )


class BytesSource(Protocol):
    """Where the bytes of a row can be read again; it can be pickled."""

    def read(self, sha256: str) -> bytes:
        """The bytes with this digest. Raises `RowError` if they are no longer there."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The bytes of one part of a row, found and checked.

    A reader that may need the bytes again keeps `without_data`, which is small.

    Attributes:
        kind: kind of media.
        sha256: hex digest of the bytes; of a list of frames, a digest of theirs.
        path: the file, every link followed; ``None`` if the row holds the bytes.
        data: the bytes; ``None`` if a file holds them, or after `without_data`.
        origin: where to read `data` again; ``None`` if a file holds the bytes, or if the data file
            has no access by row.
        frames: the frames of a part that lists several files, instead of `path` and `data`.
        options: the part's other keys.
    """

    kind: str
    sha256: str
    path: Path | None = None
    data: bytes | None = None
    origin: BytesSource | None = None
    frames: tuple[Payload, ...] = ()
    options: Mapping[str, Any]

    def open(self) -> BinaryIO:
        """Open the bytes for reading.

        Raises:
            OSError: the file cannot be opened, or `without_data` left nothing to read.
            RowError: ``QC-DATA-006``: the part lists several files, and the reader wants one; or
                the error of `origin`.
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
        if self.path is not None:
            return self.path.open("rb")
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.origin is None:
            raise FileNotFoundError("the bytes of a row, which cannot be read again")
        return io.BytesIO(self.origin.read(self.sha256))

    @property
    def lasting(self) -> bool:
        """Whether the bytes can be read after `without_data`."""
        if self.frames:
            return all(frame.lasting for frame in self.frames)
        return self.path is not None or self.origin is not None

    def without_data(self) -> Payload:
        """The same payload without the bytes of the row, which `open` then reads again."""
        if self.data is None and not self.frames:
            return self
        frames = tuple(frame.without_data() for frame in self.frames)
        return replace(self, data=None, frames=frames)


class Medium(Protocol):
    """One payload, processed: small itself, its values are in a cache.

    It can be pickled, and holds what `MediaReader.batch` needs to process the payload again.
    """

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

    def preview(self, payload: Payload, size: int) -> str:
        """A small picture of a payload for people, as a data URL; empty where there is none.

        Args:
            payload: its bytes; a fault in them gives an empty string.
            size: pixels of the longer side.
        """
        ...


class MeasuringReader(MediaReader, Protocol):
    """A `MediaReader` that can also read media for people, who need no values.

    A reader without this method reads media as for a run.
    """

    def measuring(self, size: int) -> MediaReader:
        """A reader that checks media and measures them, and neither makes nor caches their values.

        Args:
            size: pixels of the longer side of the largest picture that `preview` is asked for; 0:
                none.
        """
        ...


class ConcurrentReader(MediaReader, Protocol):
    """A `MediaReader` that says whether several threads may call `read` at once.

    A reader without this attribute is called by one thread at a time.
    """

    @property
    def concurrent(self) -> bool:
        """Whether they may."""
        ...
