"""The best approximation of a matrix by two matrices of a rank, and its error.

This file decides the algorithm: an exact SVD in float64 of small matrices, and of large ones
subspace iteration in float32 (Halko, Martinsson and Tropp 2011), which is exact up to rounding
where the matrix has the rank. The random start is fixed, so that the result is. The error is that
of the float32 matrices that are returned.

Shapes: r rank.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_EXACT = 512  # smaller side up to which the SVD is exact
_EXTRA = 16  # columns of the subspace beyond the rank
_ROUNDS = 4  # of subspace iteration
_BLOCK = 2**24  # elements of the error that are computed at a time


class LowRank(NamedTuple):
    """Two matrices and how well their product approximates.

    Attributes:
        a: ``[r, in]`` float32.
        b: ``[out, r]`` float32; its columns have the lengths of a's rows.
        norm: Frobenius norm of the matrix.
        error: Frobenius norm of what ``b @ a`` leaves of it.
    """

    a: Tensor
    b: Tensor
    norm: float
    error: float


def low_rank(matrix: Tensor, r: int) -> LowRank:
    """Approximate a matrix.

    Args:
        matrix: ``[out, in]``, finite.
        r: rank; at most the smaller side.
    """
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    out, into = matrix.shape
    if norm == 0.0:
        return LowRank(torch.zeros(r, into), torch.zeros(out, r), 0.0, 0.0)
    if min(out, into) <= max(_EXACT, r + _EXTRA):
        u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        u, s, v = _leading(matrix.float(), r + _EXTRA)
    root = s[:r].sqrt()
    a, b = (root[:, None] * v[:r]).float(), (u[:, :r] * root).float()
    step = max(1, _BLOCK // into)
    left = math.hypot(
        *(
            float(torch.linalg.vector_norm(rows.double() - part.double() @ a.double()))
            for rows, part in zip(matrix.split(step), b.split(step), strict=True)
        )
    )
    return LowRank(a.contiguous(), b.contiguous(), norm, left)


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular vectors and values, about `count` of them."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn((matrix.shape[1], count), generator=generator)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(_ROUNDS):
        rows, _ = torch.linalg.qr(matrix.mT @ basis)
        basis, _ = torch.linalg.qr(matrix @ rows)
    u, s, v = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, v
