"""Compares saved weights of an adapter with the base and with each other, in blocks of rows.

This file decides that two tensors are equal if all values are, also in another dtype: PEFT saves an
embedding in the dtype in which training held the base. LoRA on an embedding equals LoRA on a head
if the matrices are each other's transposes, as PEFT's ``ensure_weight_tying`` leaves them.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoint.checkpoint import Checkpoint, Header
from ..checkpoint.layout import Layout
from ..nn.load import DTYPES, as_bytes, read_exact, read_tensor
from .changes import Change, Pair, Replacement

_BLOCK = 2**24  # elements that are compared at a time


def equal_values(
    folder: Path, header: Header, checkpoint: Checkpoint, layout: Layout, name: str
) -> bool:
    """Whether a tensor of an adapter has the values of a weight of the base.

    Args:
        folder: the adapter folder.
        header: the tensor.
        checkpoint: the base.
        layout: its layout.
        name: canonical name of the weight, which the base may lack.
    """
    item = layout.located.get(name)
    if item is None:
        return False
    if item.tied is not None:
        item = layout.located[item.tied]
    if header.shape != item.tensor.shape or header.dtype not in DTYPES or item.dtype not in DTYPES:
        return False
    rows = header.shape[0]
    columns = max(1, header.numel // rows)
    step = max(1, _BLOCK // columns)
    with (folder / header.file).open("rb") as file:
        file.seek(header.start)
        for at in range(0, rows, step):
            part = slice(at, min(at + step, rows))
            saved = torch.empty((part.stop - at, *header.shape[1:]), dtype=DTYPES[header.dtype])
            read_exact(file, as_bytes(saved), header)
            own = read_tensor(checkpoint, item, part)
            wide = torch.promote_types(saved.dtype, own.dtype)
            if not torch.equal(saved.to(wide), own.to(wide)):
                return False
    return True


def same_change(folder: Path, one: Change, other: Change) -> bool:
    """Whether two changes give weights of the same values the same new values.

    Args:
        folder: the adapter folder.
        one: a change.
        other: a change of another weight of the same shape.
    """
    if isinstance(one, Replacement) and isinstance(other, Replacement):
        if one.rows != other.rows or (one.under is None) != (other.under is None):
            return False
        if one.under and other.under and not same_change(folder, one.under, other.under):
            return False
        return _same_values(folder, one.values, other.values)
    if not (isinstance(one, Pair) and isinstance(other, Pair)) or one.scaling != other.scaling:
        return False
    if (one.under is None) != (other.under is None) or not (one.is_peft and other.is_peft):
        return False
    if one.has_magnitude or other.has_magnitude:
        return False
    if one.under and other.under and not same_change(folder, one.under, other.under):
        return False
    own, others = one.pieces[0], other.pieces[0]
    mine, theirs = ((_read(folder, piece.a), _read(folder, piece.b)) for piece in (own, others))
    if own.embedding != others.embedding:
        theirs = theirs[1].t(), theirs[0].t()
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def _same_values(folder: Path, one: Header, other: Header) -> bool:
    """Whether two tensors of an adapter have the same bytes, in blocks of rows."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    size = one.end - one.start
    with (folder / one.file).open("rb") as mine, (folder / other.file).open("rb") as theirs:
        mine.seek(one.start)
        theirs.seek(other.start)
        for at in range(0, size, _BLOCK):
            count = min(_BLOCK, size - at)
            if mine.read(count) != theirs.read(count):
                return False
    return True


def _read(folder: Path, header: Header) -> torch.Tensor:
    """Read a matrix of the adapter."""
    value = torch.empty(header.shape, dtype=DTYPES[header.dtype])
    with (folder / header.file).open("rb") as file:
        file.seek(header.start)
        read_exact(file, as_bytes(value), header)
    return value.float()
