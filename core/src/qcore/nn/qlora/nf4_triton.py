"""Triton kernel that dequantizes NF4 in one launch, bit for bit as bitsandbytes does.

This file decides how the work is cut. A program takes `_WORDS` words of eight codes; a word's
scale is its own code times the scale of its 256, plus the slice's offset: rounded after each
of the two, as bitsandbytes does in two launches, so products and sums must not be fused
(``enable_fp_fusion=False``). What is read is `nf4`'s.

Shapes: n slices, each ``[rows, cols]`` of ``8 words`` values and ``words / 8`` blocks.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...api.records import Verdict
from ..kernels.language import tl, triton
from ..kernels.launch import cdiv, launch
from .nf4 import BLOCK, VALUES, Codes, of_weights
from .nf4 import dequantize as reference

_WORDS = 1024  #: words of a program: 16 KiB of 16-bit values
_WARPS = 4


@triton.jit
def scale_of(absmax, absmax2, code2, offset, block, here):
    """The scales of blocks `block` of one slice."""
    scale = tl.load(code2 + tl.load(absmax + block, mask=here, other=0).to(tl.int32))
    scale = scale * tl.load(absmax2 + block // 256, mask=here, other=0.0)
    return scale + offset


@triton.jit
def eight(words, scale, table):
    """``[n] -> [n, 8]``: the values of words of eight codes."""
    # A byte's first value is in its high half: 1 0 3 2 5 4 7 6.
    place = (tl.arange(0, 8) ^ 1) * 4
    return tl.load(table + ((words[:, None] >> place[None, :]) & 15)) * scale[:, None]


# One version for all shapes: strides come in words, so that what is aligned is known.
@triton.jit(
    do_not_specialize=["words", "blocks", "blocks2", "words_row", "slice_words", "row_words"]
)
def _dequantize(
    packed,
    absmax,
    absmax2,
    code2,
    offset,
    table,
    out,
    words,
    blocks,
    blocks2,
    words_row,
    slice_words,
    row_words,
    FLAT: tl.constexpr,
    WORDS: tl.constexpr,
):
    number = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    here = word < words
    codes = tl.load(packed + number * words + word, mask=here, other=0)
    scale = scale_of(
        absmax + number * blocks,
        absmax2 + number * blocks2,
        code2,
        tl.load(offset + number),
        word // 8,
        here,
    )
    values = eight(codes, scale, table)
    if FLAT:
        at = word.to(tl.int64) * 8
    else:
        row = word // words_row
        at = (row.to(tl.int64) * row_words + (word - row * words_row)) * 8
    target = out + number * slice_words * 8 + at[:, None] + tl.arange(0, 8)[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=here[:, None])


def dequantize(codes: Codes, out: Tensor) -> Tensor:
    """Write the values of `codes` into `out`; see `nf4.dequantize`."""
    n, rows, cols = out.shape
    size = rows * cols
    if size % BLOCK or cols % 8 or out.stride(2) != 1 or out.stride(0) % 8 or out.stride(1) % 8:
        return reference(codes, out)
    words = codes.packed.view(n, -1).view(torch.int32)
    grid = (cdiv(size // 8, _WORDS), n)
    launch(
        _dequantize,
        grid,
        words,
        codes.absmax,
        codes.absmax2,
        codes.code2,
        codes.offset,
        table_of(out.device),
        out,
        size // 8,
        size // BLOCK,
        codes.absmax2.shape[-1],
        cols // 8,
        out.stride(0) // 8,
        out.stride(1) // 8,
        FLAT=out.stride(1) == cols,
        WORDS=_WORDS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return out


@functools.cache
def table_of(device: torch.device) -> Tensor:
    """`VALUES` on a device."""
    return torch.tensor(VALUES, device=device)


def verify(device: torch.device) -> Verdict:
    """Bit equality with the reference, on slices, odd counts, rows that lie apart; NaN below."""
    wrong = 0.0
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in (
        ((3, 48, 320), torch.bfloat16),
        ((1, 7, 64), torch.bfloat16),
        ((2, 128, 128), torch.float32),
    ):
        weight = torch.randn(shape, generator=generator).to(device, dtype)
        codes = of_weights(weight)
        expected = reference(codes, torch.empty_like(weight))
        for gap in (0, 16):
            room = weight.new_full((*shape[:2], shape[2] + gap), torch.nan)
            got = dequantize(codes, room[..., : shape[2]])
            if not torch.equal(got, expected) or not room[..., shape[2] :].isnan().all():
                wrong = float("inf")
    return Verdict(output=wrong, output_bound=0.0)
