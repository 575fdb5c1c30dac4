"""NF4 with double quantisation, in bitsandbytes' format.

This file decides how a 4-bit weight is held and read back; the arithmetic is bitsandbytes'
(QLoRA, Dettmers et al. 2023, sections 3.1 and 3.2): blocks of 64 values share a scale,
blocks of 256 scales share one of their own. The unit is one canonical tensor, of a stack
each slice: double-quantisation statistics cannot be shared.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

#: Bits per parameter: 4, plus 8 bits a block of 64, plus 32 bits a block of 64 * 256.
BITS = 4 + 8 / 64 + 32 / (64 * 256)


@functools.cache
def _functional() -> Any:
    # At import bitsandbytes logs that an optional CPU kernel is absent; it is not ours to say.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional as functional

    return functional


class NF4:
    """One weight ``[out, in]`` in 4 bit.

    Args:
        weight: floating point, on the device where it will stay.
        dtype: dtype that `dense` returns.
    """

    __slots__ = ("packed", "shape", "state")

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.shape = tuple(weight.shape)
        self.packed, self.state = _functional().quantize_4bit(
            weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        self.state.dtype = dtype

    def dense(self) -> Tensor:
        """The dequantised weight ``[out, in]``, a fresh tensor."""
        weight: Tensor = _functional().dequantize_4bit(self.packed, self.state)
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and both levels of scales."""
        state = self.state
        tensors = (self.packed, state.absmax, state.state2.absmax)
        return sum(tensor.nbytes for tensor in tensors)
