"""Decodes block FP8 weights: 8-bit floats times one scale for each block of the weight.

This file decides how such a weight is read: ``W = W8 * scale`` by block, in float32, rounded
once. It is the format that transformers calls ``fp8`` with ``weight_block_size``: scales lie
in ``NAME_scale_inv``, by which, despite the name, values are multiplied (DeepSeek-V3 technical
report, section 3.3). Which checkpoints hold it says `prequantized`; other 8-bit formats are
not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 2**20  # elements that are in float32 at a time


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """``[..., out, in]`` of 8-bit floats and ``[..., ceil(out/b0), ceil(in/b1)]`` scales.

    A vector counts as one row. Beside the result a few blocks of rows are in memory.
    """
    rows, columns = weight.shape[-2:] if weight.dim() > 1 else (1, len(weight))
    value = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    stacks = (weight.reshape(-1, rows, columns), value.view(-1, rows, columns))
    scales = scale.float().reshape(-1, *scale.shape[-2:])
    high = max(1, _PIECE // max(1, block[0] * columns))  # blocks of rows at a time
    for w, into, s in zip(*stacks, scales, strict=True):
        for at in range(0, len(s), high):
            part = slice(at * block[0], min((at + high) * block[0], rows))
            spread = s[at : at + high].repeat_interleave(block[1], 1)[:, :columns]
            spread = spread.repeat_interleave(block[0], 0)[: part.stop - part.start]
            into[part] = spread.mul_(w[part].float())
    return value
