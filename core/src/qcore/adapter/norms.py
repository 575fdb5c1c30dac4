"""Norms of the deltas of an adapter, and of their differences, without forming a delta.

``||B A||_F^2 = sum((A A^T) * (B^T B))``, and the difference of two deltas is the product of their
matrices side by side, so products of the rank's size are enough. They are computed in float64. A
difference below about 1e-8 of the norm is rounding. This file decides that the matrices of one
module are in memory at a time. DoRA's magnitude is left out: its effect depends on the base.

Shapes: E experts, r rank of one LoRA pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.checkpoint import Header
from ..nn.load import DTYPES, as_bytes, read_exact
from .contents import FilePair
from .replaced_values import check_finite

_EXPERTS = 16  # experts that are computed at a time


def read_value(folder: Path, header: Header) -> Tensor:
    """Read a tensor of an adapter in the dtype of the file.

    Raises:
        NumericError: ``QC-MERGE-003`` it contains a NaN or an infinity.
    """
    value = torch.empty(header.shape, dtype=DTYPES[header.dtype])
    with (folder / header.file).open("rb") as file:
        file.seek(header.start)
        read_exact(file, as_bytes(value), header)
    check_finite(value, folder, header)
    return value


def delta_norm(folder: Path, pair: FilePair) -> float | None:
    """Return the Frobenius norm of the delta of a module, over all of its experts.

    Returns:
        The norm; ``None`` if the rank or the scaling is not known.
    """
    if pair.scaling is None:
        return None
    square = sum(square_of_product(a, b) for a, b in _experts(folder, pair))
    return abs(pair.scaling) * math.sqrt(square)


def difference_norm(one: Path, mine: FilePair, other: Path, theirs: FilePair) -> float | None:
    """Return the Frobenius norm of the difference of two deltas of one module.

    Returns:
        The norm; ``None`` if a rank or scaling is not known, or the deltas have different shapes.
    """
    if mine.scaling is None or theirs.scaling is None or mine.experts != theirs.experts:
        return None
    if len(mine.a.shape) != 2 or len(theirs.a.shape) != 2:
        return None  # the rows and columns of experts in three dims are not compared
    if (mine.a.shape[1], mine.b.shape[0]) != (theirs.a.shape[1], theirs.b.shape[0]):
        return None
    square = 0.0
    for (a, b), (c, d) in zip(_experts(one, mine), _experts(other, theirs), strict=True):
        rows = torch.cat([a, c], dim=1)
        columns = torch.cat([mine.scaling * b, -theirs.scaling * d], dim=2)
        square += square_of_product(rows, columns)
    return math.sqrt(square)


def _experts(folder: Path, pair: FilePair) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield A ``[e, r, in]`` and B ``[e, out, r]`` of some experts at a time, float64."""
    assert pair.r is not None
    a, b = read_value(folder, pair.a), read_value(folder, pair.b)
    experts = pair.experts
    if a.dim() == 3:  # other layouts than PEFT's; a first size of 1 is shared by all experts
        experts = max(len(a), len(b))
        a, b = (side.expand(experts, -1, -1) for side in (a, b))
    else:
        a = a.unflatten(0, (experts, pair.r))
        # Row e r + k of A and column k E + e of B belong to expert e.
        b = b.unflatten(1, (pair.r, experts)).permute(2, 0, 1)
    for at in range(0, experts, _EXPERTS):
        yield a[at : at + _EXPERTS].double(), b[at : at + _EXPERTS].double()


def square_of_product(a: Tensor, b: Tensor) -> float:
    """Return the sum of squares of ``b @ a``, not below zero.

    Args:
        a: ``[..., r, in]``.
        b: ``[..., out, r]``.
    """
    return max(0.0, float(((a @ a.mT) * (b.mT @ b)).sum()))
