"""Which rows are held out for the evaluation.

This file decides the choice: by a hash of the seed and of a row's content (the tokens and media of
its last sample), so that it depends neither on the order of the file nor on which tokens are
trained.

Code: ``QC-DATA-015`` too few rows to split.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

if TYPE_CHECKING:
    from .store.samples import Samples


def held_out(
    samples: Samples, train: int, fraction: float, seed: int, path: Path
) -> NDArray[np.int64]:
    """Choose the rows to hold out.

    Args:
        samples: all samples of a store.
        train: number of the samples of training sources, which come first.
        fraction: of the rows, in [0, 1).
        seed: of the choice.
        path: the data file, for the error.

    Returns:
        The numbers of the rows.

    Raises:
        InputError: ``QC-DATA-015`` if no training row would be left.
    """
    if not fraction:
        return np.empty(0, np.int64)
    rows = samples.column("row")[:train]
    last = np.flatnonzero(np.append(rows[1:] != rows[:-1], True))
    count = max(1, round(len(last) * fraction))
    if count >= len(last):
        raise InputError(
            "QC-DATA-015",
            "has too few rows to hold some out",
            file=path,
            found=f"{len(last)} rows, eval_fraction {fraction}",
            fix="set eval_fraction=0 or add rows",
        )
    ranks = _ranks(samples.column("content")[:train][last], seed)
    chosen: NDArray[np.int64] = rows[last][np.lexsort((rows[last], ranks))[:count]]
    return chosen


def _ranks(digests: NDArray[Any], seed: int) -> NDArray[np.uint64]:
    """A number for each digest, mixed with the seed by the finalizer of SplitMix64."""
    key = int.from_bytes(hashlib.sha256(f"{seed}:held out".encode()).digest()[:8], "little")
    ranks: NDArray[np.uint64] = np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0].copy()
    ranks ^= np.uint64(key)
    ranks = (ranks ^ (ranks >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    ranks = (ranks ^ (ranks >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ranks ^ (ranks >> np.uint64(31))
