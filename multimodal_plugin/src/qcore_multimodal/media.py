"""One image or video as training keeps it: sizes and digest, no values.

Patches are 16 x 16 pixels of two frames; the tower's merger turns ``merge x merge`` of them into
one embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

KINDS: Final = ("image", "video")  #: types of parts that are read


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedMedium:
    """A processed image or video (`qcore.api.media.Medium`).

    Attributes:
        kind: one of `KINDS`.
        digest: of its bytes and of how they were processed; names its values in the cache.
        grid: patches in time, height and width.
        merge: patches along each side of what becomes one embedding.
        timestamps: of a video, when each patch in time is, as its timestamps say; else empty.
    """

    kind: str
    digest: str
    grid: tuple[int, int, int]
    merge: int
    timestamps: tuple[float, ...] = ()

    @property
    def units(self) -> int:
        """Patches."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Embeddings that the tower makes of it."""
        return self.units // self.merge**2
