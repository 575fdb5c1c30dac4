"""What Triton kernels of this family share: how rows lie, and which dtypes they take.

How they are started is core's (`qcore.ops.launch`): not where there are no rows, nor for
tensors that hold no numbers, under which launches and memory are counted without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcore.ops import cdiv, launch, next_power_of_2

__all__ = ["cdiv", "launch", "next_power_of_2", "rows_of", "supported"]


def rows_of(x: Tensor) -> Tensor:
    """``[..., d] -> [R, d]`` with adjacent columns; a copy only where x does not lie so."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def supported(*tensors: Tensor) -> None:
    """Refuse what the kernels would compute in fewer digits than it has.

    Raises:
        ValueError: for another dtype than bfloat16, float16 and float32.
    """
    for tensor in tensors:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"no Triton kernel for {tensor.dtype}: use the reference backend")
