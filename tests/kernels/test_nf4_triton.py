"""NF4 read by Triton against bitsandbytes: the same bits, and nothing beside them."""

from __future__ import annotations

import pytest
import torch

from qcore.nn.qlora.nf4 import NF4, NF4Stack, dequantize, of_weights

triton = pytest.importorskip("triton")

from qcore.nn.qlora import nf4_triton  # noqa: E402  after conftest has set the interpreter

CPU = torch.device("cpu")
# bf16 is left to the card: the interpreter cuts off where a card rounds.
DTYPES = [torch.float32, torch.float16]
#: Blocks that end with rows and that do not, one and two scales of scales, a part of a program.
SHAPES = [(1, 7, 64), (3, 48, 80), (2, 130, 128), (1, 3, 8000)]


def weights(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator) / 50).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_bitsandbytes_bit_for_bit(shape: tuple[int, int, int], dtype: torch.dtype):
    value = weights(shape, dtype)
    codes = of_weights(value)
    expected = dequantize(codes, torch.empty_like(value))
    found = nf4_triton.dequantize(codes, torch.full_like(value, torch.nan))
    assert torch.equal(found, expected)
    room = torch.full((shape[0] + 1, shape[1] + 1, shape[2] + 24), torch.nan, dtype=dtype)
    nf4_triton.dequantize(codes, room[1:, 1:, 8 : shape[2] + 8])
    assert torch.equal(room[1:, 1:, 8 : shape[2] + 8], expected)
    room[1:, 1:, 8 : shape[2] + 8] = torch.nan
    assert room.isnan().all()


@pytest.mark.parametrize("shape", [(2, 5, 14), (1, 64, 4), (2, 3, 40)], ids=str)
def test_odd_shapes_are_left_to_the_reference(shape: tuple[int, int, int]):
    value = weights(shape, torch.float32)
    codes = of_weights(value)
    expected = dequantize(codes, torch.empty_like(value))
    assert torch.equal(nf4_triton.dequantize(codes, torch.empty_like(value)), expected)


def test_holders_read_by_it():
    value = weights((4, 48, 80), torch.float32)
    stacks = [
        NF4Stack((4, 48, 80), torch.float32, CPU, read)
        for read in (nf4_triton.dequantize, dequantize)
    ]
    for stack in stacks:
        stack.put(slice(0, 4), value)
    mine, theirs = stacks
    assert torch.equal(mine.dense(), theirs.dense())
    assert torch.equal(mine.dense_slices(slice(1, 3)), theirs.dense_slices(slice(1, 3)))
    assert torch.equal(mine.dense_slice(3), theirs.dense_slice(3))
    one = NF4(value[0], torch.float32, nf4_triton.dequantize)
    assert torch.equal(one.dense(), NF4(value[0], torch.float32).dense())
    assert torch.equal(one.into(torch.empty(48, 80)), one.dense())


def test_the_check_passes_what_is_right_and_sees_what_is_not(monkeypatch: pytest.MonkeyPatch):
    real = nf4_triton.dequantize

    def exact(codes, out):  # type: ignore[no-untyped-def]
        return dequantize(codes, out) if out.dtype == torch.bfloat16 else real(codes, out)

    monkeypatch.setattr(nf4_triton, "dequantize", exact)
    assert nf4_triton.verify(CPU).good
    off = lambda codes, out: exact(codes._replace(offset=codes.offset * 1.001), out)  # noqa: E731
    monkeypatch.setattr(nf4_triton, "dequantize", off)
    assert not nf4_triton.verify(CPU).good
