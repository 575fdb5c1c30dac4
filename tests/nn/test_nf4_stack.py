"""A stack in 4 bit: each slice has the bits that bitsandbytes gives it alone."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qcore.nn.qlora.nf4 import NF4, NF4Stack

CPU = torch.device("cpu")
#: Blocks of 64 values, and of 256 scales, that end with slices; that do not; odd sizes.
SHAPES = [
    (3, 128, 128),  # 16384 values: both end
    (2, 256, 192),
    (4, 64, 64),  # 64 scales of 256
    (5, 48, 80),  # 60 scales
    (2, 128, 129),  # a scale of its own for the last 16384th part
    (3, 33, 62),  # 2046 values: the last block has 62
    (3, 5, 13),  # 65 values: half a byte is left over
    (1, 1, 1),
]


def stack(shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """Slices of unlike sizes of values, so that no scale fits another slice."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(shape, generator=generator)
    return (value * torch.logspace(-2, 2, shape[0])[:, None, None]).to(dtype)


def held(value: Tensor, dtype: torch.dtype | None = None) -> NF4Stack:
    made = NF4Stack(tuple(value.shape), dtype or value.dtype, CPU)  # type: ignore[arg-type]
    made.put(slice(0, len(value)), value)
    return made


def alone(value: Tensor) -> tuple[Tensor, bnb.QuantState]:
    packed, state = bnb.quantize_4bit(
        value.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_slice_is_what_bitsandbytes_makes_of_it(
    shape: tuple[int, int, int], dtype: torch.dtype
):
    value = stack(shape, dtype)
    mine = held(value)
    for number, weight in enumerate(value):
        packed, state = alone(weight)
        assert torch.equal(mine.packed[number], packed.flatten())
        assert torch.equal(mine.absmax[number], state.absmax)
        assert torch.equal(mine.absmax2[number], state.state2.absmax)
        assert torch.equal(mine.offset[number], state.offset)
        if weight.numel() % 64 == 0:
            # Rows of one block: bitsandbytes' CPU kernel misreads rows of 80 (25 % off, not 9).
            state.shape = torch.Size((weight.numel() // 64, 64))
        reference = bnb.dequantize_4bit(packed, state).view_as(weight)
        if weight.numel() > 64:
            assert (reference - weight).norm() <= 0.12 * weight.norm()
        assert reference.dtype == mine.dense_slice(number).dtype == dtype
        assert torch.equal(mine.dense_slice(number), reference)
        assert torch.equal(NF4(weight, dtype).dense(), reference)
    assert shape == (1, 1, 1) or not torch.equal(mine.dense(), value)  # it is quantized


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_together_is_one_by_one(shape: tuple[int, int, int]):
    mine = held(stack(shape, torch.bfloat16))
    apart = [mine.dense_slice(number) for number in range(shape[0])]
    assert torch.equal(mine.dense(), torch.stack(apart))
    for first in range(shape[0]):
        for last in range(first + 1, shape[0] + 1):
            assert torch.equal(
                mine.dense_slices(slice(first, last)), torch.stack(apart[first:last])
            )


def test_a_slice_does_not_depend_on_the_others():
    value = stack((3, 48, 80), torch.float32)
    other = value.clone()
    other[0], other[2] = 1e4, 0
    assert torch.equal(held(value).dense_slice(1), held(other).dense_slice(1))
    assert not held(other).dense_slice(2).any()


def test_slices_may_come_in_any_slabs_and_dtypes():
    value = stack((5, 48, 80), torch.bfloat16)
    whole, parts = held(value), NF4Stack((5, 48, 80), torch.bfloat16, CPU)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 5)):
        parts.put(rows, value[rows])
    assert torch.equal(parts.dense(), whole.dense())
    # Of a wider dtype the values are the same, and so are the codes.
    assert torch.equal(held(value.float(), torch.bfloat16).packed, whole.packed)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        parts.put(slice(0, 2), value[:3])


def test_what_is_read_is_fresh():
    for shape in ((2, 128, 128), (2, 48, 80)):
        mine = held(stack(shape, torch.float32))
        mine.dense().zero_()
        mine.dense_slice(1).zero_()
        assert mine.dense().any()
        assert mine.dense_slice(1).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_slices(shape: tuple[int, int, int]):
    value = stack(shape, torch.bfloat16)
    expected = 0
    for weight in value:
        packed, state = alone(weight)
        parts = packed, state.absmax, state.state2.absmax, state.offset
        expected += sum(part.numel() * part.element_size() for part in parts)
    assert held(value).nbytes == expected


def test_bits_a_parameter():
    """4, 8 for each 64, 32 for each 16384, 32 for the mean of a slice: 4.127 at full width."""
    value = stack((2, 512, 1024), torch.bfloat16)
    bits = 4 + 8 / 64 + 32 / (64 * 256) + 32 / (512 * 1024)
    assert held(value).nbytes * 8 / value.numel() == pytest.approx(bits, rel=1e-12)
    assert bits == pytest.approx(4.127, abs=1e-4)
