"""How a Triton kernel is started.

This file decides that nothing runs where there is nothing to run on: no rows, or tensors that
hold no numbers (fake ones, under which launches and memory are counted without a card).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """``kernel[grid](*args, **meta)``; the first argument is a tensor."""
    first = args[0]
    if isinstance(first, FakeTensor) or first.device.type == "meta" or 0 in grid:
        return
    kernel[grid](*args, **meta)


def rows_of(x: Tensor) -> Tensor:
    """``[..., d] -> [R, d]`` with adjacent columns; a copy only where x does not lie so."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def supported(*tensors: Tensor) -> None:
    """Refuse what the kernels would compute in fewer digits than it has.

    Raises:
        ValueError: for another dtype than bfloat16, float16 and float32.
    """
    for one in tensors:
        if one.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"no Triton kernel for {one.dtype}: use the reference backend")
