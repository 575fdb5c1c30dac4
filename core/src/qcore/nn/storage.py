"""Identity of a tensor's storage: whether two tensors share one block of memory."""

from __future__ import annotations

from torch import Tensor


def storage_id(tensor: Tensor) -> int:
    """A number that is equal for two living tensors if and only if they share their storage."""
    return int(tensor.untyped_storage()._cdata)
