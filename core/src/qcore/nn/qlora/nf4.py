"""NF4 with double quantization, in bitsandbytes' format.

This file decides how 4-bit weights are held and read back; the arithmetic is bitsandbytes'
(QLoRA, Dettmers et al. 2023, sections 3.1 and 3.2): blocks of 64 values share a scale,
blocks of 256 scales share one of their own. The unit is one canonical tensor, of a stack
each slice: double-quantization statistics cannot be shared.

Reading back is an op, ``nf4_dequantize``: `dequantize` is its reference.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK, BLOCK2 = 64, 256  #: values that share a scale, scales that share one

#: The value of each code: quantiles of N(0, 1), scaled to [-1, 1] (QLoRA, appendix E).
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Codes(NamedTuple):
    """What n slices of as many values each are quantized to.

    Attributes:
        packed: two codes a byte, the first in the high half, uint8 ``[n, ceil(size / 2)]``.
        absmax: codes of the scales, uint8 ``[n, blocks]``.
        absmax2: scales of the scales, float32 ``[n, ceil(blocks / 256)]``.
        code2: the value of each code of a scale, float32 ``[256]``.
        offset: mean of a slice's scales, float32 ``[n]``.
    """

    packed: Tensor
    absmax: Tensor
    absmax2: Tensor
    code2: Tensor
    offset: Tensor


def dequantize(codes: Codes, out: Tensor) -> Tensor:
    """Write the values of `codes` into `out` and return it: bitsandbytes, slice by slice.

    Args:
        codes: n slices.
        out: ``[n, rows, cols]``, 16-bit or float32; the last dimension contiguous.
    """
    bnb = functional()
    for number, slab in enumerate(out):
        state2 = bnb.QuantState(
            absmax=codes.absmax2[number], code=codes.code2, blocksize=BLOCK2, dtype=torch.float32
        )
        scales = bnb.dequantize_blockwise(codes.absmax[number], state2)
        state = bnb.QuantState(
            absmax=scales.add_(codes.offset[number]),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=out.dtype,
        )
        slab.copy_(_dequantize(codes.packed[number].view(-1, 1), state, tuple(slab.shape)))
    return out


Dequantize = Callable[[Codes, Tensor], Tensor]


def of_weights(weights: Tensor) -> Codes:
    """The codes of slices ``[n, rows, cols]``, each quantized alone."""
    pairs = [_quantize(weight) for weight in weights]
    return Codes(
        torch.stack([packed.flatten() for packed, _ in pairs]),
        torch.stack([state.absmax for _, state in pairs]),
        torch.stack([state.state2.absmax for _, state in pairs]),
        pairs[0][1].state2.code,
        torch.stack([state.offset.reshape(()) for _, state in pairs]),
    )


@functools.cache
def functional() -> Any:
    """Return the module of bitsandbytes' functions."""
    # At import bitsandbytes logs that an optional CPU kernel is absent; it is not ours to say.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


def _dequantize(packed: Tensor, state: Any, shape: tuple[int, ...]) -> Tensor:
    """The values of `packed`, read as rows of one block each.

    bitsandbytes 0.50.2 on CPUs misreads rows that are a multiple of 16 and not of 64 long: what
    comes back is 20 to 30 % off instead of 9. A block knows nothing of rows, so any will do.
    """
    size = math.prod(shape)
    row = shape[-1] if size % BLOCK else BLOCK
    state.shape = torch.Size((size // row, row))
    weight: Tensor = functional().dequantize_4bit(packed, state)
    return weight.view(shape)


def _quantize(weight: Tensor) -> tuple[Tensor, Any]:
    packed, state = functional().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


class NF4:
    """One weight ``[out, in]`` in 4 bit.

    Args:
        weight: floating point, on the device where it will stay.
        dtype: dtype that `dense` returns.
        read: what reads codes; `dequantize` and its equals.
    """

    __slots__ = ("packed", "read", "shape", "state")

    def __init__(self, weight: Tensor, dtype: torch.dtype, read: Dequantize = dequantize) -> None:
        self.shape = tuple(weight.shape)
        self.packed, self.state = _quantize(weight)
        self.state.dtype = dtype
        self.read = read

    @classmethod
    def of_codes(
        cls, shape: tuple[int, ...], packed: Tensor, state: Any, read: Dequantize = dequantize
    ) -> NF4:
        """Hold a weight that is quantized already, in this format; nothing is rounded.

        Args:
            shape: of the weight.
            packed: two codes a byte, uint8 ``[size / 2, 1]``.
            state: bitsandbytes' state, whose dtype `dense` returns.
            read: what reads codes; `dequantize` and its equals.
        """
        held = cls.__new__(cls)
        held.shape, held.packed, held.state, held.read = shape, packed, state, read
        return held

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""
        dtype: torch.dtype = self.state.dtype
        return dtype

    def dense(self) -> Tensor:
        """The dequantized weight ``[out, in]``, a fresh tensor."""
        if self.read is dequantize:
            return _dequantize(self.packed, self.state, self.shape)
        return self.into(self.packed.new_empty(self.shape, dtype=self.dtype))

    def into(self, out: Tensor) -> Tensor:
        """Write the dequantized weight into `out` ``[out, in]``, whose rows may lie apart."""
        state = self.state
        codes = Codes(
            self.packed.view(1, -1),
            state.absmax[None],
            state.state2.absmax[None],
            state.state2.code,
            state.offset.view(1),
        )
        self.read(codes, out[None])
        return out

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and both levels of scales."""
        state = self.state
        tensors = (self.packed, state.absmax, state.state2.absmax)
        return sum(tensor.nbytes for tensor in tensors)


class NF4Stack:
    """A stack ``[E, out, in]`` of which each slice is quantized as `NF4` quantizes it.

    Args:
        shape: of the stack.
        dtype: dtype that `dense` and `dense_slice` return.
        device: where it is held.
        read: what reads codes; `dequantize` and its equals.

    Attributes:
        packed: two codes a byte, ``[E, ceil(out * in / 2)]``.
        absmax: the scales' own codes, ``[E, blocks]``.
        absmax2: scales of the scales, float32 ``[E, ceil(blocks / 256)]``.
        offset: mean of the scales of a slice, float32 ``[E]``.
    """

    __slots__ = ("absmax", "absmax2", "code2", "dtype", "offset", "packed", "read", "shape")

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        read: Dequantize = dequantize,
    ) -> None:
        self.shape, self.dtype, self.read = shape, dtype, read
        experts, size = shape[0], shape[1] * shape[2]
        blocks = math.ceil(size / BLOCK)
        self.packed = torch.empty(experts, math.ceil(size / 2), dtype=torch.uint8, device=device)
        self.absmax = torch.empty(experts, blocks, dtype=torch.uint8, device=device)
        self.absmax2 = torch.empty(experts, math.ceil(blocks / BLOCK2), device=device)
        self.offset = torch.empty(experts, device=device)
        self.code2: Tensor | None = None

    def put(self, rows: slice, value: Tensor) -> None:
        """Quantize the slices `rows`, given as ``[n, out, in]``."""
        for number, weight in zip(range(rows.start, rows.stop), value, strict=True):
            packed, state = _quantize(weight)
            self.packed[number] = packed.flatten()
            self.absmax[number] = state.absmax
            self.absmax2[number] = state.state2.absmax
            self.offset[number] = state.offset
            self.code2 = state.state2.code

    def dense_slice(self, number: int) -> Tensor:
        """Slice ``[out, in]``, dequantized, a fresh tensor."""
        if self.read is not dequantize:
            return self.dense_slices(slice(number, number + 1))[0]
        here = slice(number, number + 1)
        return self._read(here, self._scales(here))[0]

    def dense_slices(self, rows: slice) -> Tensor:
        """Neighbours ``[n, out, in]``, dequantized, a fresh tensor."""
        if self.read is not dequantize:
            return self.read(
                self.codes(rows),
                self.packed.new_empty(rows.stop - rows.start, *self.shape[1:], dtype=self.dtype),
            )
        size = self.shape[1] * self.shape[2]
        if size % (BLOCK * BLOCK2):
            return torch.stack(
                [self.dense_slice(number) for number in range(rows.start, rows.stop)]
            )
        return self._read(rows, self._scales(rows))

    def dense(self) -> Tensor:
        """The whole stack ``[E, out, in]``, dequantized."""
        return self.dense_slices(slice(0, self.shape[0]))

    def codes(self, rows: slice) -> Codes:
        """What the slices `rows` are quantized to, not copied."""
        assert self.code2 is not None, "nothing was put"
        return Codes(
            self.packed[rows], self.absmax[rows], self.absmax2[rows], self.code2, self.offset[rows]
        )

    def _scales(self, rows: slice) -> Tensor:
        """Scales ``[n, blocks]`` float32 of slices whose own blocks do not straddle."""
        bnb = functional()
        codes = self.absmax[rows]
        state = bnb.QuantState(
            absmax=self.absmax2[rows].flatten(),
            code=self.code2,
            blocksize=BLOCK2,
            dtype=torch.float32,
        )
        scales: Tensor = bnb.dequantize_blockwise(codes.flatten(), state)
        return scales.view_as(codes).add_(self.offset[rows, None])

    def _read(self, rows: slice, scales: Tensor) -> Tensor:
        bnb = functional()
        shape = (rows.stop - rows.start, *self.shape[1:])
        state = bnb.QuantState(
            absmax=scales.flatten(),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
        )
        return _dequantize(self.packed[rows].view(-1, 1), state, shape)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes and both levels of scales."""
        held = (self.packed, self.absmax, self.absmax2, self.offset)
        return sum(tensor.nbytes for tensor in held)
