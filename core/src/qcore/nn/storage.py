"""`storage_id`: whether two tensors share memory (4-bit weight storage is in `nn.qlora.nf4`)."""

from __future__ import annotations

from torch import Tensor


def storage_id(tensor: Tensor) -> int:
    """A number that is equal for two living tensors if and only if they share their storage."""
    return int(tensor.untyped_storage()._cdata)
