"""`ProcessedMedium`: the size, digest and timestamps of one image or video, without its pixels.

A patch is 16 x 16 pixels of two frames; the tower's merger turns ``merge x merge`` patches into one
embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from qcore.api import Payload

KINDS: Final = ("image", "video")  #: types of content parts that the reader supports


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedMedium:
    """A processed image or video (`qcore.api.media.Medium`).

    Attributes:
        kind: one of `KINDS`.
        digest: hash of the bytes and of all processing parameters; the key of the cache entry.
        grid: patches in time, height and width.
        merge: patches along each side of the block that becomes one embedding.
        timestamps: time of each temporal patch of a video in seconds; empty for an image.
        source: the payload without the bytes of a row, to process it again after eviction.
    """

    kind: str
    digest: str
    grid: tuple[int, int, int]
    merge: int
    timestamps: tuple[float, ...] = ()
    source: Payload | None = field(default=None, compare=False, repr=False)

    @property
    def units(self) -> int:
        """Number of patches."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Number of embeddings that the tower computes."""
        return self.units // self.merge**2
