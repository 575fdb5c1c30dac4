"""NF4 with double quantisation, in bitsandbytes' format.

This file decides how 4-bit weights are held and read back; the arithmetic is bitsandbytes'
(QLoRA, Dettmers et al. 2023, sections 3.1 and 3.2): blocks of 64 values share a scale,
blocks of 256 scales share one of their own. The unit is one canonical tensor, of a stack
each slice: double-quantisation statistics cannot be shared.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor

_BLOCK, _BLOCK2 = 64, 256  # values that share a scale, scales that share one


@functools.cache
def _functional() -> Any:
    # At import bitsandbytes logs that an optional CPU kernel is absent; it is not ours to say.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional as functional

    return functional


def _dequantize(packed: Tensor, state: Any, shape: tuple[int, ...]) -> Tensor:
    """The values of `packed`, read as rows of one block each.

    bitsandbytes 0.50.2 on CPUs misreads rows that are a multiple of 16 and not of 64 long: what
    comes back is 20 to 30 % off instead of 9. A block knows nothing of rows, so any will do.
    """
    size = math.prod(shape)
    row = shape[-1] if size % _BLOCK else _BLOCK
    state.shape = torch.Size((size // row, row))
    weight: Tensor = _functional().dequantize_4bit(packed, state)
    return weight.view(shape)


def _quantize(weight: Tensor) -> tuple[Tensor, Any]:
    packed, state = _functional().quantize_4bit(
        weight.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


class NF4:
    """One weight ``[out, in]`` in 4 bit.

    Args:
        weight: floating point, on the device where it will stay.
        dtype: dtype that `dense` returns.
    """

    __slots__ = ("packed", "shape", "state")

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.shape = tuple(weight.shape)
        self.packed, self.state = _quantize(weight)
        self.state.dtype = dtype

    def dense(self) -> Tensor:
        """The dequantised weight ``[out, in]``, a fresh tensor."""
        return _dequantize(self.packed, self.state, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and both levels of scales."""
        state = self.state
        tensors = (self.packed, state.absmax, state.state2.absmax)
        return sum(tensor.nbytes for tensor in tensors)


class NF4Stack:
    """A stack ``[E, out, in]`` of which each slice is quantised as `NF4` quantises it.

    Args:
        shape: of the stack.
        dtype: dtype that `dense` and `one` return.
        device: where it is held.

    Attributes:
        packed: two codes a byte, ``[E, ceil(out * in / 2)]``.
        absmax: the scales' own codes, ``[E, blocks]``.
        absmax2: scales of the scales, float32 ``[E, ceil(blocks / 256)]``.
        offset: mean of the scales of a slice, float32 ``[E]``.
    """

    __slots__ = ("absmax", "absmax2", "code2", "dtype", "offset", "packed", "shape")

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape, self.dtype = shape, dtype
        experts, size = shape[0], shape[1] * shape[2]
        blocks = math.ceil(size / _BLOCK)
        self.packed = torch.empty(experts, math.ceil(size / 2), dtype=torch.uint8, device=device)
        self.absmax = torch.empty(experts, blocks, dtype=torch.uint8, device=device)
        self.absmax2 = torch.empty(experts, math.ceil(blocks / _BLOCK2), device=device)
        self.offset = torch.empty(experts, device=device)
        self.code2: Tensor | None = None

    def put(self, rows: slice, value: Tensor) -> None:
        """Quantise the slices `rows`, given as ``[n, out, in]``."""
        for number, weight in zip(range(rows.start, rows.stop), value, strict=True):
            packed, state = _quantize(weight)
            self.packed[number] = packed.flatten()
            self.absmax[number] = state.absmax
            self.absmax2[number] = state.state2.absmax
            self.offset[number] = state.offset
            self.code2 = state.state2.code

    def one(self, number: int) -> Tensor:
        """Slice ``[out, in]``, dequantised, a fresh tensor."""
        here = slice(number, number + 1)
        return self._read(here, self._scales(here))[0]

    def some(self, rows: slice) -> Tensor:
        """Neighbours ``[n, out, in]``, dequantised: two launches where blocks end with slices."""
        size = self.shape[1] * self.shape[2]
        if size % (_BLOCK * _BLOCK2):
            return torch.stack([self.one(number) for number in range(rows.start, rows.stop)])
        return self._read(rows, self._scales(rows))

    def dense(self) -> Tensor:
        """The whole stack ``[E, out, in]``, dequantised."""
        return self.some(slice(0, self.shape[0]))

    def _scales(self, rows: slice) -> Tensor:
        """Scales ``[n, blocks]`` float32 of slices whose own blocks do not straddle."""
        functional = _functional()
        codes = self.absmax[rows]
        state = functional.QuantState(
            absmax=self.absmax2[rows].flatten(),
            code=self.code2,
            blocksize=_BLOCK2,
            dtype=torch.float32,
        )
        scales: Tensor = functional.dequantize_blockwise(codes.flatten(), state)
        return scales.view_as(codes).add_(self.offset[rows, None])

    def _read(self, rows: slice, scales: Tensor) -> Tensor:
        functional = _functional()
        shape = (rows.stop - rows.start, *self.shape[1:])
        state = functional.QuantState(
            absmax=scales.flatten(),
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
        )
        return _dequantize(self.packed[rows].view(-1, 1), state, shape)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and both levels of scales."""
        held = (self.packed, self.absmax, self.absmax2, self.offset)
        return sum(tensor.nbytes for tensor in held)
