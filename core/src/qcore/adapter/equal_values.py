"""Compares a saved weight of an adapter with the base, a block of rows at a time.

This file decides that two tensors are equal if all values are, also in another dtype: PEFT saves an
embedding in the dtype in which training held the base.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoint.checkpoint import Checkpoint, Header
from ..checkpoint.layout import Layout
from ..nn.load import DTYPES, as_bytes, read_exact, read_tensor

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
        name: canonical name of the weight.
    """
    item = layout.located[name]
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
