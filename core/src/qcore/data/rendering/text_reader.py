"""What stands for a reader of media in a process that reads none.

This file decides which rows such a process leaves to the parent: those with media, and those whose
rendering holds a placeholder of media.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ...api.blocks import Media
    from ...api.media import Medium, Payload, Placed


class DeferredRow(Exception):
    """A row that only the parent can render, because it has media."""


@dataclass(frozen=True, slots=True)
class TextReader:
    """Stands for a reader of media in a worker: it knows what media are, and reads none.

    Attributes:
        kinds: as `MediaReader.kinds`.
        keys: as `MediaReader.keys`.
        control: as `MediaReader.control`.
    """

    kinds: tuple[str, ...]
    keys: tuple[str, ...]
    control: tuple[str, ...]

    def read(self, payload: Payload) -> Medium:
        """Leave the row to the parent."""
        raise DeferredRow

    def expand(self, text: str, media: Sequence[Medium]) -> str:
        """The text itself, if it has no placeholder."""
        if any(token in text for token in self.control):
            raise DeferredRow
        return text

    def place(self, ids: Sequence[int], media: Sequence[Medium]) -> Placed:
        """Leave the row to the parent."""
        raise DeferredRow

    def batch(self, media: Sequence[Medium], where: Tensor) -> Media:
        """Leave the row to the parent."""
        raise DeferredRow

    def preview(self, payload: Payload, size: int) -> str:
        """Leave the row to the parent."""
        raise DeferredRow
