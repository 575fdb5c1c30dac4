"""Triton kernels of the fused QLoRA product: read NF4 weights, apply LoRA, compute its gradients.

This file decides how a program finds its member: by a table of addresses, which is made again when
one of them changes, so that a stack of four maps costs no more launches than one map. `fused`
decides when each kernel is called, and with what. What DoRA adds is in `dora_triton`.

``fill``   every member's weight into its rows of the buffer, 4-bit ones bit for bit as
           `nf4_triton` reads them, and LoRA from its trained factors to where products read it
``thin``   ``x right^T`` and, on the same pass over x, ``[x | x right^T]``
``outer``  the gradients of A and B of all members, added in float32 in place

Shapes: T rows, K in, N out of all members, R ranks of all members, r of one.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
from __future__ import annotations

from torch import Tensor

from ..kernels.language import tl, triton
from ..kernels.launch import cdiv, launch, next_power_of_2
from . import dora
from .dora_triton import scale_gradient
from .fused import Product, through
from .fused_factors import WorkingFactors
from .fused_tables import FIELDS, WIDEST, Gradients, Sources, fits
from .nf4_triton import eight, scale_of, table_of

#: (rows, columns of x, warps, stages); (columns, rows, warps, stages)
THIN, OUTER = (64, 64, 4, 6), (64, 64, 4, 4)
#: Rows from which programs of some rows each fill a GPU.
FEWEST = 2048


def linear(x: Tensor, product: Product) -> tuple[Tensor, ...]:
    """The members' maps of `x`; see `fused.reference`."""
    return through(TritonKernels, x, product)


class TritonKernels:
    """`fused.FusedKernels` by the kernels of this file."""

    @staticmethod
    def takes(product: Product, like: Tensor) -> bool:
        """Whether a table can describe the members."""
        return fits(product, like.dtype)

    @staticmethod
    def fill(
        product: Product,
        buffer: Tensor,
        working: WorkingFactors | None,
        *,
        place: bool,
        fresh: bool,
    ) -> None:
        """Write all weights, and LoRA's matrices if asked."""
        ranks = 0 if working is None else len(working.a)
        sources = product.tables.sources(product, ranks, buffer.device)
        a, b = (buffer, buffer) if working is None else (working.a, working.b)
        fill(sources, buffer, a, b, place=place, fresh=fresh)

    @staticmethod
    def thin(x: Tensor, right: Tensor, *, beside: bool) -> tuple[Tensor | None, Tensor] | None:
        """``[x | x right^T]`` and ``x right^T``, of many rows and few ranks."""
        if len(x) < FEWEST or len(right) > WIDEST or x.dtype.itemsize != 2:
            return None
        return thin(x, right, beside=beside)

    @staticmethod
    def outer(product: Product, x: Tensor, xa: Tensor, dy: Tensor, dyb: Tensor) -> bool:
        """Add the gradients, where all are kept in float32."""
        if x.dtype.itemsize != 2 or xa.shape[1] > WIDEST:
            return False
        gradients = product.tables.gradients(list(product.adapters()), OUTER[0])
        if gradients is None:
            return False
        outer(gradients, dy, x, xa, dyb)
        return True

    @staticmethod
    def scale_gradient(dy: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients of DoRA's scaling in one pass, in at most float32."""
        if dy.dtype.itemsize > 4:
            return dora.scale_gradient(dy, y, scale)
        return scale_gradient(dy, y, scale)


def fill(
    sources: Sources, buffer: Tensor, a: Tensor, b: Tensor, *, place: bool, fresh: bool
) -> None:
    """Write the weights, and LoRA's matrices.

    Args:
        sources: of the members.
        buffer: ``[N, K + R]``, ``[N + R, K]``, or without R where nothing is placed.
        a: ``[R, K]``.
        b: ``[N, R]``, block-diagonal.
        place: write A or B into the buffer.
        fresh: write `a` and `b` from the masters.
    """
    first = 0 if place or fresh else sources.lora
    launch(
        _fill, (sources.programs - first,),
        buffer, a, b, sources.table, table_of(buffer.device),
        first, sources.count, sources.out, sources.into, sources.ranks,
        sources.into // 8, buffer.stride(0) // 8,
        WIDE=sources.wide, PLACE=place, FRESH=fresh, FIELDS=FIELDS,
        ENTRIES=next_power_of_2(sources.count),
        BR=next_power_of_2(max(sources.ranks, 8)),
        WORDS=sources.WORDS, VALUES=sources.VALUES, ROWS=sources.ROWS, RUN=sources.RUN,
        num_warps=4, enable_fp_fusion=False,
        also=sources.tensors,
    )  # fmt: skip


def thin(x: Tensor, right: Tensor, *, beside: bool) -> tuple[Tensor | None, Tensor]:
    """``[x | x right^T]`` where `beside` says so, and ``x right^T``.

    Args:
        x: ``[T, K]``; rows may lie apart.
        right: ``[R, K]``, in any layout.
        beside: whether the first is wanted.
    """
    (tokens, into), ranks = x.shape, len(right)
    out = x.new_empty(tokens, ranks)
    both = x.new_empty(tokens, into + ranks) if beside else None
    rows, columns, warps, stages = THIN
    launch(
        _thin, (cdiv(tokens, rows),),
        x, right, out, out if both is None else both,
        tokens, into, ranks, x.stride(0), right.stride(0), right.stride(1),
        BESIDE=beside, EVEN=into % columns == 0, TURNED=right.stride(1) != 1,
        BM=rows, BK=columns, BR=max(16, next_power_of_2(ranks)),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return both, out


def outer(gradients: Gradients, dy: Tensor, x: Tensor, xa: Tensor, dyb: Tensor) -> None:
    """Add ``s dy_i^T xa_i`` to the gradient of each B and ``dyb_i^T x`` to that of each A.

    Args:
        gradients: where they lie.
        dy: ``[T, N]``; rows of all four may lie apart.
        x: ``[T, K]``
        xa: ``[T, R]``, ``x A^T``.
        dyb: ``[T, R]``, ``dy s B``.
    """
    columns, rows, warps, stages = OUTER
    launch(
        _outer, (gradients.programs,),
        dy, x, xa, dyb, gradients.table, gradients.count, len(dy),
        dy.stride(0), x.stride(0), xa.stride(0), dyb.stride(0),
        ALIGNED=gradients.aligned,
        FIELDS=FIELDS, ENTRIES=next_power_of_2(gradients.count),
        BM=rows, BN=columns, BR=max(16, next_power_of_2(gradients.widest)),
        num_warps=warps, num_stages=stages, also=gradients.tensors,
    )  # fmt: skip


@triton.jit
def _entry(TABLE, pid, count, FIELDS: tl.constexpr, ENTRIES: tl.constexpr):
    """The row of the table whose programs `pid` is among, and which of them it is."""
    n = tl.arange(0, ENTRIES)
    start = tl.load(TABLE + n * FIELDS, mask=n < count, other=1 << 40)
    before = start <= pid
    row = TABLE + (tl.sum(before.to(tl.int32)) - 1) * FIELDS
    return row, pid - tl.max(tl.where(before, start, 0)).to(tl.int32)


@triton.jit
def _float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["first", "count", "out", "into", "ranks", "words_row", "row_words"])
def _fill(
    BUFFER, A, B, TABLE, values, first, count, out, into, ranks, words_row, row_words,
    WIDE: tl.constexpr, PLACE: tl.constexpr, FRESH: tl.constexpr,
    FIELDS: tl.constexpr, ENTRIES: tl.constexpr, BR: tl.constexpr,
    WORDS: tl.constexpr, VALUES: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    row, block = _entry(TABLE, tl.program_id(0) + first, count, FIELDS, ENTRIES)
    kind = tl.load(row + 1)
    if kind == 0:
        _codes(row, block, BUFFER, values, words_row, row_words, WORDS)
    elif kind == 1:
        _values(row, block, BUFFER, into, row_words, VALUES)
    elif kind == 2:
        _of_b(row, block, BUFFER, B, into, ranks, row_words, FRESH, PLACE and WIDE, BR, ROWS)
    else:
        _of_a(row, block, BUFFER, A, into, out, FRESH, PLACE and not WIDE, RUN)


@triton.jit
def _codes(row, block, BUFFER, values, words_row, row_words, WORDS: tl.constexpr):
    """Words of eight codes of one weight."""
    word = block * WORDS + tl.arange(0, WORDS)
    # Known of a buffer's address and of whole blocks; what comes from a table says it itself.
    here = word < tl.multiple_of(tl.load(row + 4).to(tl.int32), 8)
    source = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.int32)), 16)
    scale = scale_of(
        tl.load(row + 5).to(tl.pointer_type(tl.uint8)),
        tl.load(row + 6).to(tl.pointer_type(tl.float32)),
        tl.load(row + 7).to(tl.pointer_type(tl.float32)),
        tl.load(tl.load(row + 8).to(tl.pointer_type(tl.float32))),
        word // 8, here,
    )  # fmt: skip
    value = eight(tl.load(source + word, mask=here, other=0), scale, values)
    line = word // words_row
    at = (tl.load(row + 3).to(tl.int32) + line) * row_words + (word - line * words_row)
    target = BUFFER + at[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(target, value.to(BUFFER.dtype.element_ty), mask=here[:, None])


@triton.jit
def _values(row, block, BUFFER, into, row_words, VALUES: tl.constexpr):
    """Values of a 16-bit weight."""
    i = block * VALUES + tl.arange(0, VALUES)
    here = i < tl.load(row + 4).to(tl.int32)
    source = tl.load(row + 2).to(tl.pointer_type(BUFFER.dtype.element_ty))
    line = i // into
    at = (tl.load(row + 3).to(tl.int32) + line) * row_words * 8 + (i - line * into)
    tl.store(BUFFER + at, tl.load(source + i, mask=here), mask=here)


@triton.jit
def _of_b(
    row, block, BUFFER, B, into, ranks, row_words,
    FRESH: tl.constexpr, PLACE: tl.constexpr, BR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of one member's B, scaled; zero in the ranks of others."""
    rank, r = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
    i = block * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BR)[None, :]
    here = (i < tl.load(row + 4).to(tl.int32)) & (c < ranks)
    source = tl.load(row + 2).to(tl.pointer_type(tl.float32)) + i * r + (c - rank)
    value = tl.load(source, mask=here & (c >= rank) & (c < rank + r), other=0.0)
    value = (value * _float(tl.load(row + 7))).to(BUFFER.dtype.element_ty)
    line = tl.load(row + 3).to(tl.int32) + i
    if FRESH:
        tl.store(B + line * ranks + c, value, mask=here)
    if PLACE:
        tl.store(BUFFER + line * row_words * 8 + into + c, value, mask=here)


@triton.jit
def _of_a(
    row, block, BUFFER, A, into, out,
    FRESH: tl.constexpr, PLACE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Values of one member's A; no address: zeros."""
    i = block * RUN + tl.arange(0, RUN)
    here = i < tl.load(row + 4).to(tl.int32)
    source = tl.load(row + 2)
    value = tl.load(
        source.to(tl.pointer_type(tl.float32)) + i, mask=here & (source != 0), other=0.0
    ).to(BUFFER.dtype.element_ty)
    begin = tl.load(row + 3).to(tl.int32)
    if FRESH:
        tl.store(A + begin * into + i, value, mask=here)
    if PLACE:
        tl.store(BUFFER + (out + begin) * into + i, value, mask=here)


@triton.jit(do_not_specialize=["tokens"])
def _thin(
    X, RIGHT, OUT, BOTH, tokens, into, ranks, stride_x, stride_r, stride_k,
    BESIDE: tl.constexpr, EVEN: tl.constexpr, TURNED: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = (i < tokens)[:, None]
    k, r = tl.arange(0, BK), tl.arange(0, BR)
    at = X + i[:, None] * stride_x + k[None, :]
    if TURNED:
        right = RIGHT + k[:, None].to(tl.int64) * stride_k + r[None, :]
        mask = (r < ranks)[None, :]
    else:
        right = RIGHT + r[:, None].to(tl.int64) * stride_r + k[None, :]
        mask = (r < ranks)[:, None]
    wide = into + ranks
    to = BOTH + i[:, None] * wide + k[None, :]
    acc = tl.zeros((BM, BR), tl.float32)
    for k0 in range(0, into, BK):
        if EVEN:
            x = tl.load(at, mask=live, other=0.0)
            factor = tl.load(right, mask=mask, other=0.0)
        else:
            inside = k0 + k < into
            x = tl.load(at, mask=live & inside[None, :], other=0.0)
            beyond = inside[:, None] if TURNED else inside[None, :]
            factor = tl.load(right, mask=mask & beyond, other=0.0)
        if BESIDE:
            if EVEN:
                tl.store(to, x, mask=live)
            else:
                tl.store(to, x, mask=live & (k0 + k < into)[None, :])
            to += BK
        acc = tl.dot(x, factor if TURNED else tl.trans(factor), acc)
        at += BK
        right += BK * stride_k if TURNED else BK
    mask = live & (r < ranks)[None, :]
    value = acc.to(OUT.dtype.element_ty)
    tl.store(OUT + i[:, None] * ranks + r[None, :], value, mask=mask)
    if BESIDE:
        tl.store(BOTH + i[:, None] * wide + into + r[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["count", "tokens"])
def _outer(
    DY, X, XA, DYB, TABLE, count, tokens, stride_dy, stride_x, stride_xa, stride_dyb,
    ALIGNED: tl.constexpr, FIELDS: tl.constexpr, ENTRIES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row, block = _entry(TABLE, tl.program_id(0), count, FIELDS, ENTRIES)
    kind, target = tl.load(row + 1), tl.load(row + 2).to(tl.pointer_type(tl.float32))
    begin, size = tl.load(row + 3), tl.load(row + 4).to(tl.int32)
    rank, ranks = tl.load(row + 5), tl.load(row + 6).to(tl.int32)
    if ALIGNED:  # what is read from a table is not known to be, and then nothing is vectorised
        begin, size = tl.multiple_of(begin, 8), tl.multiple_of(size, 8)
        rank, ranks = tl.multiple_of(rank, 8), tl.multiple_of(ranks, 8)
    n = block * BN + tl.arange(0, BN)
    real = n < size
    r = tl.arange(0, BR)
    if kind == 0:
        big, stride_big, small, stride_small = DY, stride_dy, XA, stride_xa
    else:
        big, stride_big, small, stride_small = X, stride_x, DYB, stride_dyb
    i = tl.arange(0, BM)
    at = big + begin + i[:, None].to(tl.int64) * stride_big + n[None, :]
    beside = small + rank + i[:, None].to(tl.int64) * stride_small + r[None, :]
    acc = tl.zeros((BN, BR), tl.float32)
    for t in range(0, tokens, BM):
        live = (t + i < tokens)[:, None]
        one = tl.load(at, mask=live & real[None, :], other=0.0)
        other = tl.load(beside, mask=live & (r < ranks)[None, :], other=0.0)
        acc = tl.dot(tl.trans(one), other, acc)
        at += BM * stride_big
        beside += BM * stride_small
    to = target + n[:, None] * tl.load(row + 7) + r[None, :] * tl.load(row + 8)
    mask = real[:, None] & (r < ranks)[None, :]
    acc = acc * _float(tl.load(row + 9))
    tl.store(to, acc + tl.load(to, mask=mask, other=0.0), mask=mask)
