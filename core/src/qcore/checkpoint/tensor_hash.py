"""SHA-256 of a canonical tensor, independent of its layout on disk.

This file decides what is hashed: each of the smallest pieces in any spelling of the tensor, and
then the digests of the pieces in the order of their regions. A tensor that no spelling splits is
hashed as its bytes. Fused and per-expert files therefore have the same digest, no piece is read
twice, and pieces may come in any order. This file imports no torch and reads no file.
"""

from __future__ import annotations

import hashlib
import math

from ..api.parameters import Region
from ..api.parameters import Tensor as TableTensor


class TensorDigest:
    """Incremental digest of one canonical tensor.

    Attributes:
        units: the regions that are hashed separately, in order.
    """

    __slots__ = ("_digests", "_numbers", "units")

    def __init__(self, tensor: TableTensor) -> None:
        self.units: tuple[Region, ...] = tensor.units()
        self._numbers = {_key(unit): number for number, unit in enumerate(self.units)}
        self._digests: dict[int, bytes] = {}

    def inside(self, region: Region) -> list[tuple[int, Region]]:
        """Return (number, region relative to `region`) of each unit within `region`, in order."""
        number = self._numbers.get(_key(region))
        if number is not None:
            return [(number, tuple(slice(0, r.stop - r.start) for r in region))]
        return [
            (
                number,
                tuple(slice(u.start - r.start, u.stop - r.start) for u, r in zip(unit, region)),
            )
            for number, unit in enumerate(self.units)
            if all(r.start <= u.start and u.stop <= r.stop for u, r in zip(unit, region))
        ]

    def put(self, number: int, sha256: bytes) -> None:
        """Set the digest of a unit.

        Args:
            number: index in `units`.
            sha256: raw digest of its bytes, in row-major order.
        """
        self._digests[number] = sha256

    @property
    def known(self) -> dict[int, bytes]:
        """The digests of the units that have one, by number."""
        return dict(self._digests)

    @property
    def hex(self) -> str | None:
        """The tensor's digest in hex; ``None`` until every unit has one."""
        if len(self._digests) != len(self.units):
            return None
        if len(self.units) == 1:
            return self._digests[0].hex()
        joined = b"".join(self._digests[number] for number in range(len(self.units)))
        return hashlib.sha256(joined).hexdigest()


def _key(region: Region) -> tuple[tuple[int, int], ...]:
    """Return a region as a dict key: slices are not hashable before Python 3.12."""
    return tuple((span.start, span.stop) for span in region)


def in_one_run(unit: Region, shape: tuple[int, ...]) -> bool:
    """Return whether a region of a row-major tensor of `shape` is contiguous in memory."""
    extents = [span.stop - span.start for span in unit]
    partial = [dim for dim, (n, size) in enumerate(zip(extents, shape)) if n != size]
    # All dimensions before the last partial one must have extent 1.
    return not partial or all(n == 1 for n in extents[: partial[-1]])


def numel(region: Region) -> int:
    """Return the number of elements in a region."""
    return math.prod(span.stop - span.start for span in region)
