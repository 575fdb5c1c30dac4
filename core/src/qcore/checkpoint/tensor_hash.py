"""SHA-256 of a canonical tensor, independent of its layout on disk.

This file decides what is hashed: the finest pieces that any spelling of the tensor has, each
alone, and then their digests in the order of the regions; a tensor that is never cut is its
bytes. So fused and per-expert files have one digest, no piece is read twice for it, and pieces
may come in any order. It needs no torch and reads nothing.
"""

from __future__ import annotations

import hashlib
import math

from ..api.parameters import Region
from ..api.parameters import Tensor as TableTensor


class TensorDigest:
    """The digest of one canonical tensor in the making.

    Attributes:
        units: regions that are hashed alone, in order.
    """

    __slots__ = ("_numbers", "_parts", "units")

    def __init__(self, tensor: TableTensor) -> None:
        self.units: tuple[Region, ...] = tensor.units()
        self._numbers = {_key(unit): number for number, unit in enumerate(self.units)}
        self._parts: dict[int, bytes] = {}

    def inside(self, region: Region) -> list[tuple[int, Region]]:
        """Numbers of the units within `region`, and where in it they are, in order."""
        alone = self._numbers.get(_key(region))
        if alone is not None:
            return [(alone, tuple(slice(0, r.stop - r.start) for r in region))]
        return [
            (
                number,
                tuple(slice(u.start - r.start, u.stop - r.start) for u, r in zip(unit, region)),
            )
            for number, unit in enumerate(self.units)
            if all(r.start <= u.start and u.stop <= r.stop for u, r in zip(unit, region))
        ]

    def put(self, number: int, sha256: bytes) -> None:
        """Take a unit's digest."""
        self._parts[number] = sha256

    @property
    def hex(self) -> str | None:
        """The tensor's digest, once every unit has its own."""
        if len(self._parts) != len(self.units):
            return None
        if len(self.units) == 1:
            return self._parts[0].hex()
        joined = b"".join(self._parts[number] for number in range(len(self.units)))
        return hashlib.sha256(joined).hexdigest()


def _key(region: Region) -> tuple[tuple[int, int], ...]:
    """A region as a key: slices have no hash before Python 3.12."""
    return tuple((part.start, part.stop) for part in region)


def in_one_run(unit: Region, shape: tuple[int, ...]) -> bool:
    """Whether a region of a row-major tensor of `shape` is one run of its memory."""
    extents = [part.stop - part.start for part in unit]
    cut = [number for number, (n, whole) in enumerate(zip(extents, shape)) if n != whole]
    # Before the last dimension that is cut, one value each.
    return not cut or all(n == 1 for n in extents[: cut[-1]])


def numel(region: Region) -> int:
    """Values in a region."""
    return math.prod(part.stop - part.start for part in region)
