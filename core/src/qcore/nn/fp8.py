"""Block FP8: a weight in 8-bit floats and one scale for each block of it.

This file decides how such a weight is read: ``W = W8 * scale`` by block, in float32, rounded
once. It is the format that transformers calls ``fp8`` with ``weight_block_size``: scales lie
in ``NAME_scale_inv``, by which, despite the name, values are multiplied (DeepSeek-V3 technical
report, section 3.3). Other 8-bit formats are not read.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """``[..., out, in]`` of 8-bit floats and ``[..., ceil(out/b0), ceil(in/b1)]`` scales."""
    rows, columns = weight.shape[-2:]
    spread = scale.float().repeat_interleave(block[0], -2)[..., :rows, :]
    spread = spread.repeat_interleave(block[1], -1)[..., :columns]
    return spread.mul_(weight.float()).to(dtype)
