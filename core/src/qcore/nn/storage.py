"""`storage_id`: a number for the memory of a tensor, to tell whether two tensors share it."""

from __future__ import annotations

from torch import Tensor


def storage_id(tensor: Tensor) -> int:
    """A number that is equal for two living tensors if and only if they share their storage."""
    return int(tensor.untyped_storage()._cdata)
