"""The states run through the chunks of a pack, forwards and backwards.

This file decides who walks: one program per document, value head and 64 columns of v. It
holds its part of the state transposed, ``[64, dk]``: every product of a step then has as its
left side what the step before left in registers, and as its right side a tile that was
fetched meanwhile. In training's backward the states run forwards again while their gradients
run from the end, in the same launch: neither needs the other, and one alone leaves half of a
card idle on a single document. Needs Triton at import.

The formulas are those of `chunked`; a name with t is transposed. Shapes: T tokens, M chunks of
C tokens, N documents, Hk key heads of dk, Hv value heads of dv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .layout import Tables
from .triton_prepare import (
    CHUNK,
    KEPT,
    QUERY,
    READ,
    STRENGTH,
    TOTAL,
    Prepared,
    precision,
    rows_of,
)

#: Columns of v that one program has: what a warp group multiplies at a time.
WIDTH = 64
#: (warps, stages) by kernel.
CONFIG = {"outputs": (4, 2), "states": (4, 2)}


def outputs(
    q: Tensor, k: Tensor, v: Tensor, made: Prepared, initial: Tensor | None, tables: Tables
) -> tuple[Tensor, Tensor]:
    """O ``[T, Hv, dv]`` in the dtype of v and the last states ``[N, Hv, dk, dv]`` in float32."""
    (tokens, k_heads, dk), (v_heads, dv) = k.shape, v.shape[1:]
    documents = len(tables.documents)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty(documents, v_heads, dk, dv, dtype=torch.float32, device=v.device)
    width = min(WIDTH, dv)
    warps, stages = CONFIG["outputs"]
    launch(
        _outputs, (documents * v_heads * (dv // width),),
        q, k, v, *made, tables.documents, last if initial is None else initial, o, last,
        q.stride(0), k.stride(0), v.stride(0), tokens, v_heads,
        GROUP=v_heads // k_heads, DK=dk, DV=dv, C=CHUNK, BV=width, INITIAL=initial is not None,
        PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o, last


def states(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    made: Prepared,
    initial: Tensor | None,
    tables: Tables,
    do: Tensor | None,
    dlast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the gradients are made of.

    Args:
        q: ``[T, Hk, dk]``; k likewise; v: ``[T, Hv, dv]``.
        k: see q.
        v: see q.
        made: what `prepare` made of them.
        initial: ``[N, Hv, dk, dv]``, or zeros.
        tables: the pack's.
        do: ``[T, Hv, dv]``, or zeros.
        dlast: ``[N, Hv, dk, dv]`` gradient of the last states, or zeros.

    Returns:
        In the dtype of v: Vn and the gradient of the residue, ``[T, Hv, dv]``; S and the
        gradient of S', ``[M, Hv, dv, dk]``. In float32 the gradient of `initial`
        (``[N, Hv, dk, dv]``; empty where there is none).
    """
    (tokens, k_heads, dk), (v_heads, dv) = k.shape, v.shape[1:]
    documents, chunks = len(tables.documents), len(tables.chunks)
    written = torch.empty_like(v, memory_format=torch.contiguous_format)
    dresidue = torch.empty_like(written)
    before, after = (v.new_empty(chunks, v_heads, dv, dk) for _ in range(2))
    shape = (0,) if initial is None else (documents, v_heads, dk, dv)
    dfirst = torch.empty(shape, dtype=torch.float32, device=v.device)
    width = min(WIDTH, dv)
    warps, stages = CONFIG["states"]
    launch(
        _states, (2 * documents * v_heads * (dv // width),),
        q, k, v, *made, tables.documents, dfirst if initial is None else initial,
        v if do is None else do, dfirst if dlast is None else dlast,
        written, dresidue, before, after, dfirst,
        q.stride(0), k.stride(0), v.stride(0), 0 if do is None else do.stride(0), tokens, v_heads,
        GROUP=v_heads // k_heads, DK=dk, DV=dv, C=CHUNK, BV=width, INITIAL=initial is not None,
        OUTPUT=do is not None, LAST=dlast is not None,
        PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return written, dresidue, before, after, dfirst


@triton.jit
def _factor(FACTOR, number, rows, valid, tokens, v_heads):
    return tl.load(FACTOR + number * tokens.to(tl.int64) * v_heads + rows, mask=valid, other=0.0)


@triton.jit
def _outputs(
    Q, K, V, A, P, FACTOR, DOCUMENTS, FIRST, OUT, LAST,
    q_stride, k_stride, v_stride, tokens, v_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The forward: o and the last state."""
    blocks: tl.constexpr = DV // BV
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, entry = (pair % v_heads).to(tl.int64), pair // v_heads
    start, end = tl.load(DOCUMENTS + 4 * entry), tl.load(DOCUMENTS + 4 * entry + 1)
    document = tl.load(DOCUMENTS + 4 * entry + 3).to(tl.int64)
    i, columns = tl.arange(0, C).to(tl.int64), block * BV + tl.arange(0, BV)
    Q += head // GROUP * DK
    K += head // GROUP * DK
    V += head * DV + block * BV
    A += head * tokens * C
    P += head * tokens * C
    FACTOR += head * tokens
    OUT += head * DV + block * BV
    at = (document * v_heads + head) * DK * DV + tl.arange(0, DK)[None, :] * DV + columns[:, None]
    st = tl.zeros((BV, DK), tl.float32)
    if INITIAL:
        st += tl.load(FIRST + at).to(tl.float32)
    for row in range(start, end, C):
        rows = i + row
        valid = rows < end
        k = rows_of(K, rows, valid, k_stride, DK)
        sb = st.to(k.dtype)
        seen = tl.dot(sb, tl.trans(k), input_precision=PRECISION)
        vt = tl.trans(rows_of(V, rows, valid, v_stride, BV)).to(tl.float32)
        read = _factor(FACTOR, READ, rows, valid, tokens, v_heads)
        strength = _factor(FACTOR, STRENGTH, rows, valid, tokens, v_heads)
        residue = (vt - seen * read[None, :]) * strength[None, :]
        inverse = rows_of(A, rows, valid, C, C)
        new = tl.dot(residue.to(k.dtype), tl.trans(inverse), input_precision=PRECISION)
        q = rows_of(Q, rows, valid, q_stride, DK)
        query = _factor(FACTOR, QUERY, rows, valid, tokens, v_heads)
        out = tl.dot(sb, tl.trans(q), input_precision=PRECISION) * query[None, :]
        scores = rows_of(P, rows, valid, C, C)
        out = tl.dot(new.to(k.dtype), tl.trans(scores), out, input_precision=PRECISION)
        where = rows[:, None] * v_heads * DV + tl.arange(0, BV)[None, :]
        tl.store(OUT + where, tl.trans(out).to(OUT.dtype.element_ty), mask=valid[:, None])
        kept = _factor(FACTOR, KEPT, rows, valid, tokens, v_heads)
        whole = tl.load(FACTOR + TOTAL * tokens + tl.minimum(row + C, end) - 1)
        st = st * tl.exp(whole)
        st = tl.dot((new * kept[None, :]).to(k.dtype), k, st, input_precision=PRECISION)
    tl.store(LAST + at, st)


@triton.jit
def _states(
    Q, K, V, A, P, FACTOR, DOCUMENTS, FIRST, DO, DLAST, WRITTEN, DRESIDUE, BEFORE, AFTER, DFIRST,
    q_stride, k_stride, v_stride, do_stride, tokens, v_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    INITIAL: tl.constexpr, OUTPUT: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Odd programs run the states forwards, even ones their gradients backwards."""
    blocks: tl.constexpr = DV // BV
    forwards, rest = tl.program_id(0) % 2, tl.program_id(0) // 2
    block, pair = rest % blocks, rest // blocks
    head, entry = (pair % v_heads).to(tl.int64), pair // v_heads
    start, end = tl.load(DOCUMENTS + 4 * entry), tl.load(DOCUMENTS + 4 * entry + 1)
    first_chunk = tl.load(DOCUMENTS + 4 * entry + 2).to(tl.int64)
    document = tl.load(DOCUMENTS + 4 * entry + 3).to(tl.int64)
    columns = block * BV + tl.arange(0, BV)
    d = tl.arange(0, DK)
    Q += head // GROUP * DK
    K += head // GROUP * DK
    A += head * tokens * C
    P += head * tokens * C
    FACTOR += head * tokens
    at = (document * v_heads + head) * DK * DV + d[None, :] * DV + columns[:, None]
    here = (first_chunk * v_heads + head) * DV * DK + columns[:, None] * DK + d[None, :]
    state = tl.zeros((BV, DK), tl.float32)
    if forwards == 1:
        if INITIAL:
            state += tl.load(FIRST + at).to(tl.float32)
        _forwards(
            state, K, V + head * DV + block * BV, A, FACTOR, WRITTEN + head * DV + block * BV,
            BEFORE + here, start, end, k_stride, v_stride, tokens, v_heads,
            DK, DV, C, BV, PRECISION,
        )  # fmt: skip
    else:
        if LAST:
            state += tl.load(DLAST + at).to(tl.float32)
        state = _backwards(
            state, Q, K, A, P, FACTOR, DO + head * DV + block * BV,
            DRESIDUE + head * DV + block * BV, AFTER + here, start, end,
            q_stride, k_stride, do_stride, tokens, v_heads, DK, DV, C, BV, OUTPUT, PRECISION,
        )  # fmt: skip
        if INITIAL:
            tl.store(DFIRST + at, state)


@triton.jit
def _forwards(
    st, K, V, A, FACTOR, WRITTEN, BEFORE, start, end, k_stride, v_stride, tokens, v_heads,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As `_outputs`, keeping S and Vn instead of o."""
    i = tl.arange(0, C).to(tl.int64)
    for row in range(start, end, C):
        rows = i + row
        valid = rows < end
        k = rows_of(K, rows, valid, k_stride, DK)
        sb = st.to(k.dtype)
        tl.store(BEFORE, sb)
        BEFORE += v_heads.to(tl.int64) * DV * DK
        seen = tl.dot(sb, tl.trans(k), input_precision=PRECISION)
        vt = tl.trans(rows_of(V, rows, valid, v_stride, BV)).to(tl.float32)
        read = _factor(FACTOR, READ, rows, valid, tokens, v_heads)
        strength = _factor(FACTOR, STRENGTH, rows, valid, tokens, v_heads)
        residue = (vt - seen * read[None, :]) * strength[None, :]
        inverse = rows_of(A, rows, valid, C, C)
        new = tl.dot(residue.to(k.dtype), tl.trans(inverse), input_precision=PRECISION)
        where = rows[:, None] * v_heads * DV + tl.arange(0, BV)[None, :]
        tl.store(WRITTEN + where, tl.trans(new).to(k.dtype), mask=valid[:, None])
        kept = _factor(FACTOR, KEPT, rows, valid, tokens, v_heads)
        whole = tl.load(FACTOR + TOTAL * tokens + tl.minimum(row + C, end) - 1)
        st = st * tl.exp(whole)
        st = tl.dot((new * kept[None, :]).to(k.dtype), k, st, input_precision=PRECISION)


@triton.jit
def _backwards(
    dst, Q, K, A, P, FACTOR, DO, DRESIDUE, AFTER, start, end,
    q_stride, k_stride, do_stride, tokens, v_heads,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of S' before each step, of the residue within it; returns that of the first."""
    i = tl.arange(0, C).to(tl.int64)
    count = tl.cdiv(end - start, C)
    stride = v_heads.to(tl.int64) * DV * DK
    AFTER += (count - 1) * stride
    for step in range(count):
        row = start + (count - 1 - step) * C
        rows = i + row
        valid = rows < end
        k = rows_of(K, rows, valid, k_stride, DK)
        dsb = dst.to(k.dtype)
        tl.store(AFTER, dsb)
        AFTER -= stride
        kept = _factor(FACTOR, KEPT, rows, valid, tokens, v_heads)
        dnew = tl.dot(dsb, tl.trans(k), input_precision=PRECISION) * kept[None, :]
        whole = tl.load(FACTOR + TOTAL * tokens + tl.minimum(row + C, end) - 1)
        dst = dst * tl.exp(whole)
        if OUTPUT:
            dot = tl.trans(rows_of(DO, rows, valid, do_stride, BV))
            scores = rows_of(P, rows, valid, C, C)
            dnew = tl.dot(dot.to(k.dtype), scores, dnew, input_precision=PRECISION)
            q = rows_of(Q, rows, valid, q_stride, DK)
            query = _factor(FACTOR, QUERY, rows, valid, tokens, v_heads)
            asked = (dot.to(tl.float32) * query[None, :]).to(k.dtype)
            dst = tl.dot(asked, q, dst, input_precision=PRECISION)
        inverse = rows_of(A, rows, valid, C, C)
        dresidue = tl.dot(dnew.to(k.dtype), inverse, input_precision=PRECISION)
        where = rows[:, None] * v_heads * DV + tl.arange(0, BV)[None, :]
        tl.store(DRESIDUE + where, tl.trans(dresidue).to(k.dtype), mask=valid[:, None])
        read = _factor(FACTOR, READ, rows, valid, tokens, v_heads)
        strength = _factor(FACTOR, STRENGTH, rows, valid, tokens, v_heads)
        taken = (dresidue * (-read * strength)[None, :]).to(k.dtype)
        dst = tl.dot(taken, k, dst, input_precision=PRECISION)
    return dst
