"""Which rows of a source are used: a share of them, or a number of them.

This file decides the choice from the number of rows, the source and a seed alone. It does not
depend on the content or the path of a file, so that a source that was moved gives the same rows.
"""

from __future__ import annotations

import hashlib
from typing import Final

from ...errors import InputError
from .source import Source

_STEP: Final = 0x9E3779B97F4A7C15  # of splitmix64, as are the constants below


def choose(rows: int, source: Source, seed: int) -> list[int]:
    """Choose rows of a source by its `weight` or `count`.

    Rows are ranked by a hash of seed and index, and the first ones are taken: the rows of a smaller
    `count` or `weight` are among those of a larger one. All rows are chosen if neither is set.

    Args:
        rows: records of the source, bad ones included.
        source: the source; its `seed` is used if it is set.
        seed: the run's seed.

    Returns:
        Indices from 0 of the chosen rows, ascending.

    Raises:
        InputError: ``QC-DATA-036`` fewer rows than `count`.
    """
    if source.count is not None:
        if source.count > rows:
            raise InputError(
                "QC-DATA-036",
                "has fewer rows than the mix takes",
                file=source.name,
                field="count",
                found=f"{rows} rows",
                expected=f"at least {source.count}",
                fix=f"set count: {rows} or leave it out",
            )
        wanted = source.count
    elif source.weight is not None:
        wanted = min(rows, max(1, round(rows * source.weight)))
    else:
        wanted = rows
    if wanted >= rows:
        return list(range(rows))
    return _first(rows, wanted, seed if source.seed is None else source.seed)


def _first(rows: int, wanted: int, seed: int) -> list[int]:
    """The `wanted` indices of lowest rank, ascending; 8 bytes a row."""
    import numpy as np

    key = int.from_bytes(hashlib.sha256(f"rows:{seed}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        mixed = np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    # splitmix64 maps different inputs to different values, so that there are no ties.
    chosen = np.argpartition(mixed, wanted)[:wanted]
    return [int(index) for index in np.sort(chosen)]
