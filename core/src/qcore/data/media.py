"""Media in rows: where their bytes may lie, and what a modality's reader makes of them.

This file decides how a content part names its bytes (a path relative to the data file, or a data
URL: nothing is fetched) and what is checked before anything decodes them: the file is there, lies
within the data file's folder, is not too large and has the digest that the row states. What the
bytes mean is the reader's (`MediaReader`), which a plugin brings with its `Modality`; which rows
have them is `schema`'s. It imports no torch.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ..nn.protocols import Media


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The bytes of one part of a row, found and checked.

    Attributes:
        kind: the part's type.
        sha256: hex digest of the bytes.
        path: the file, every link followed; ``None`` where the row holds the bytes.
        data: the bytes; ``None`` where a file holds them.
        options: the part's other keys.
    """

    kind: str
    sha256: str
    path: Path | None = None
    data: bytes | None = None
    options: Mapping[str, Any]

    def open(self) -> BinaryIO:
        """The bytes, to be read."""
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
        """Decode and process a payload, or find it in the cache. Raises `BadRow`."""
        ...

    def expand(self, text: str, media: Sequence[Medium]) -> str:
        """A rendered text with every placeholder as long as its medium.

        Raises:
            BadRow: another number of placeholders than of media, or in another order.
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
