"""Input preparation for the Triton kernels in `ops`: flattening to rows, and a check of dtypes.

Core launches the kernels (`qcore.ops.launch`): it skips launches without rows, and on the meta
device it only records launches and memory, without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.ops import cdiv, launch, next_power_of_2

__all__ = ["cdiv", "launch", "next_power_of_2", "rows_of", "supported"]


def rows_of(x: Tensor) -> Tensor:
    """``[..., d] -> [R, d]`` with contiguous columns; copies only if x has another layout."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def supported(*tensors: Tensor) -> None:
    """Refuse dtypes whose precision exceeds that of the kernels.

    Raises:
        ValueError: a dtype other than bfloat16, float16 and float32.
    """
    for tensor in tensors:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"no Triton kernel for {tensor.dtype}: use the reference backend")
