"""Last two kernels of the Triton delta rule: gradients of q, k, g and beta, per chunk.

This file decides how the gradients are accumulated. `_pairs` computes the terms through pairs of
tokens of a chunk and stores ``[C, C]`` matrices per key head; `_gradients` computes the terms
through the states and multiplies those matrices by the chunk's q and k: one program for dq and one
for dk. Each program sums over the value heads of its key head, so no sums cross programs; each
computes a part of the gradient of g, and the parts are added afterwards. A single kernel would need
more accumulators than registers and more instructions than a multiprocessor's cache holds. The
formulas are those of `chunked`, with D as in `triton_prepare`. Importing this file imports Triton.

Four warps: with eight, Triton 3.6 gives products that feed products a layout of 128 rows, and
half of the GPU computes what the other half does. A tile whose rows are multiplied by a
product's is fetched before it: of two layouts Triton takes that of the later.

Shapes: T tokens, M chunks of C tokens, Hk key heads of dk, Hv value heads of dv.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcore.ops import tl, triton

from ..launch import launch
from .layout import Tables
from .triton_prepare import (
    ASKED,
    CHUNK,
    KEPT,
    KEY,
    QUERY,
    READ,
    SAME,
    STRENGTH,
    decay,
    factor_of,
    precision,
    put,
    tile_of,
)

#: (columns of v per product, warps, stages) by kernel.
CONFIG = {"pairs": (64, 4, 1), "gradients": (64, 4, 1)}

#: Indices of the matrices that `_pairs` stores.
TO_Q = tl.constexpr(0)  #: times K is a part of dq
OF_Q = tl.constexpr(1)  #: transposed, times Q of dk
TO_K = tl.constexpr(2)  #: times K of dk
OF_K = tl.constexpr(3)  #: transposed, times K of dk
MATRICES = 4


def gradients(
    q: Tensor,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    factors: Tensor,
    do: Tensor | None,
    scanned: Sequence[Tensor],
    tables: Tables,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, g and beta, each in its dtype.

    Args:
        q: ``[T, Hk, dk]``; k likewise; g, beta: ``[T, Hv]``.
        k: see q.
        g: see q.
        beta: see q.
        factors: ``[7, Hv, T]`` of `prepare`.
        do: ``[T, Hv, dv]``, or zeros.
        scanned: D, gradient of v, S, gradient of S'.
        tables: tables of the pack.
    """
    new, has_output = scanned[0], do is not None
    (tokens, k_heads, dk), (v_heads, dv) = k.shape, new.shape[1:]
    dq, dk_, dbeta = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, beta)
    )
    dg = torch.empty(3, *g.shape, dtype=torch.float32, device=g.device)
    between = q.new_empty(MATRICES, k_heads, tokens, CHUNK)
    do = new if do is None else do
    for kernel, (width, warps, stages), programs, made in (
        (_pairs, CONFIG["pairs"], k_heads, (between, dg, dbeta)),
        (_gradients, CONFIG["gradients"], 2 * k_heads, (between, dg, dq, dk_)),
    ):
        launch(
            kernel, (programs, len(tables.chunks)),
            q, k, factors, do, *scanned, tables.chunks, *made,
            q.stride(0), k.stride(0), do.stride(0), tokens, v_heads,
            GROUP=v_heads // k_heads, DK=dk, DV=dv, BV=min(width, dv), C=CHUNK,
            OUTPUT=has_output, PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk_, dg.sum(0).to(g.dtype), dbeta


@triton.jit
def _trace(x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    return tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), 1), 0)


@triton.jit
def _total(FACTOR, count, C: tl.constexpr):
    """G and its last value; rows beyond the document have the last value, to avoid 0 * inf."""
    i = tl.arange(0, C)
    whole = tl.load(FACTOR + count - 1)
    return tl.where(i < count, tl.load(FACTOR + i, mask=i < count, other=0.0), whole), whole


@triton.jit
def _state(POINTER, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr):
    """``[DK, BV]``: some columns of a state."""
    return tl.load(POINTER + tl.arange(0, DK)[:, None] * DV + tl.arange(0, BV)[None, :])


@triton.jit
def _unnormalized(dx, x, norm, length):
    """Gradient of x from that of ``norm x``, whose length is `length`."""
    x = x.to(tl.float32)
    along = tl.sum(dx * x, 1) * norm * norm / (length * length)
    return (dx - x * along[:, None]) * norm[:, None]


@triton.jit(do_not_specialize=SAME)
def _pairs(
    Q, K, FACTOR, DO, NEW, DVALUE, BEFORE, AFTER, CHUNKS, BETWEEN, DG, DBETA,
    q_stride, k_stride, do_stride, tokens, v_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head: terms through pairs of tokens, and the gradient of beta."""
    k_head, chunk = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(CHUNKS + 2 * chunk).to(tl.int64), tl.load(CHUNKS + 2 * chunk + 1)
    count = tl.minimum(end - first, C).to(tl.int32)
    i = tl.arange(0, C)
    valid = i < count
    FACTOR += first
    head = k_head.to(tl.int64) * GROUP
    q_norm = factor_of(FACTOR + head * tokens, ASKED, count, tokens, v_heads, C, True)
    k_norm = factor_of(FACTOR + head * tokens, KEY, count, tokens, v_heads, C, True)
    queries = tl.zeros((C, C), tl.float32)
    keys = tl.zeros((C, C), tl.float32)
    for member in range(GROUP):
        head = (k_head * GROUP + member).to(tl.int64)
        factor = FACTOR + head * tokens
        column = (first * v_heads + head) * DV
        asked = tl.zeros((C, C), tl.float32)
        pairs = tl.zeros((C, C), tl.float32)
        for block in tl.static_range(DV // BV):
            new = tl.trans(tile_of(NEW + column + block * BV, count, v_heads * DV, C, BV, True))
            dvalue = tile_of(DVALUE + column + block * BV, count, v_heads * DV, C, BV, True)
            pairs = tl.dot(dvalue, new, pairs, input_precision=PRECISION)
            if OUTPUT:
                at = DO + first * do_stride + head * DV + block * BV
                do = tile_of(at, count, do_stride, C, BV, True).to(new.dtype)
                asked = tl.dot(do, new, asked, input_precision=PRECISION)
        at = (first + i) * v_heads + head
        strength = factor_of(factor, STRENGTH, count, tokens, v_heads, C, True)
        dbeta = tl.sum(tl.where(i[:, None] == i[None, :], pairs, 0.0), 1)
        dbeta /= tl.where(valid, strength, 1.0)
        tl.store(DBETA + at, dbeta.to(DBETA.dtype.element_ty), mask=valid)
        total, _ = _total(factor, count, C)
        lower = decay(total, C) * strength[None, :]
        strictly = i[:, None] > i[None, :]
        pairs = tl.where(strictly, pairs * -lower, 0.0)
        keys += pairs
        k = tile_of(K + first * k_stride + k_head * DK, count, k_stride, C, DK, True)
        kt = tl.trans(k)
        carried = tl.dot(k, kt, input_precision=PRECISION) * pairs * k_norm[:, None]
        if OUTPUT:
            asked *= lower
            queries += asked
            q = tile_of(Q + first * q_stride + k_head * DK, count, q_stride, C, DK, True)
            through = tl.dot(q, kt, input_precision=PRECISION) * asked * q_norm[:, None]
            carried += tl.where(strictly, through, 0.0)
        carried *= k_norm[None, :]
        dtotal = tl.sum(carried, 1) - tl.sum(carried, 0)
        tl.store(DG + at, tl.cumsum(dtotal, 0, reverse=True), mask=valid)
    matrix = tokens.to(tl.int64) * (v_heads // GROUP) * C
    at = BETWEEN + (k_head.to(tl.int64) * tokens + first) * C
    put(at + TO_K * matrix, keys * k_norm[None, :], count, C, C, C, True)
    put(at + OF_K * matrix, keys * k_norm[:, None], count, C, C, C, True)
    if OUTPUT:
        put(at + TO_Q * matrix, queries * k_norm[None, :], count, C, C, C, True)
        put(at + OF_Q * matrix, queries * q_norm[:, None], count, C, C, C, True)


@triton.jit(do_not_specialize=SAME)
def _gradients(
    Q, K, FACTOR, DO, NEW, DVALUE, BEFORE, AFTER, CHUNKS, BETWEEN, DG, DQ, DK_,
    q_stride, k_stride, do_stride, tokens, v_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head: even programs compute dq, odd programs dk."""
    chunk, k_head = tl.program_id(1).to(tl.int64), tl.program_id(0) // 2
    first, end = tl.load(CHUNKS + 2 * chunk).to(tl.int64), tl.load(CHUNKS + 2 * chunk + 1)
    count = tl.minimum(end - first, C).to(tl.int32)
    k_heads = v_heads // GROUP
    Q += first * q_stride + k_head * DK
    K += first * k_stride + k_head * DK
    FACTOR += first
    NEW += first * v_heads * DV
    BEFORE += chunk * v_heads * DV * DK
    BETWEEN += (k_head.to(tl.int64) * tokens + first) * C
    where = (first * k_heads + k_head) * DK
    matrix = tokens.to(tl.int64) * k_heads * C
    lines = tokens.to(tl.int64) * v_heads
    if tl.program_id(0) % 2 == 0:
        dq = _of_queries(
            Q, K, FACTOR, DO + first * do_stride, BEFORE, BETWEEN + TO_Q * matrix,
            DG + lines + first * v_heads, k_head, count, q_stride, k_stride, do_stride,
            tokens, v_heads, GROUP, DK, DV, BV, C, OUTPUT, PRECISION,
        )  # fmt: skip
        put(DQ + where, dq, count, k_heads * DK, C, DK, True)
    else:
        dk = _of_keys(
            Q, K, FACTOR, NEW, DVALUE + first * v_heads * DV, BEFORE,
            AFTER + chunk * v_heads * DV * DK, BETWEEN, matrix,
            DG + 2 * lines + first * v_heads, k_head, count, q_stride, k_stride,
            tokens, v_heads, GROUP, DK, DV, BV, C, OUTPUT, PRECISION,
        )  # fmt: skip
        put(DK_ + where, dk, count, k_heads * DK, C, DK, True)


@triton.jit
def _of_queries(
    Q, K, FACTOR, DO, BEFORE, BETWEEN, DG, k_head, count, q_stride, k_stride, do_stride,
    tokens, v_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q."""
    i = tl.arange(0, C)
    dq = tl.zeros((C, DK), tl.float32)
    for member in range(GROUP):
        head = (k_head * GROUP + member).to(tl.int64)
        dtotal = tl.zeros((C,), tl.float32)
        if OUTPUT:
            q = tile_of(Q, count, q_stride, C, DK, True)
            through = tl.zeros((C, DK), tl.float32)
            for block in tl.static_range(DV // BV):
                column = head * DV + block * BV
                do = tile_of(DO + column, count, do_stride, C, BV, True).to(q.dtype)
                before = _state(BEFORE + head * DK * DV + block * BV, DK, DV, BV)
                through = tl.dot(do, tl.trans(before), through, input_precision=PRECISION)
            factor = FACTOR + head * tokens
            query = factor_of(factor, QUERY, count, tokens, v_heads, C, True)
            dtotal += query * tl.sum(through * q.to(tl.float32), 1)
            total, _ = _total(factor, count, C)
            dq += through * tl.exp(total)[:, None]
        tl.store(DG + i * v_heads + head, tl.cumsum(dtotal, 0, reverse=True), mask=i < count)
    q = tile_of(Q, count, q_stride, C, DK, True)
    if OUTPUT:
        pairs = tile_of(BETWEEN, count, C, C, C, True)
        k = tile_of(K, count, k_stride, C, DK, True)
        dq = tl.dot(pairs, k, dq, input_precision=PRECISION)
    factor = FACTOR + k_head.to(tl.int64) * GROUP * tokens
    norm = factor_of(factor, ASKED, count, tokens, v_heads, C, True)
    return _unnormalized(dq, q, norm, DK**-0.5)


@triton.jit
def _of_keys(
    Q, K, FACTOR, NEW, DVALUE, BEFORE, AFTER, BETWEEN, matrix, DG, k_head, count,
    q_stride, k_stride, tokens, v_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of k."""
    i = tl.arange(0, C)
    dk = tl.zeros((C, DK), tl.float32)
    for member in range(GROUP):
        head = (k_head * GROUP + member).to(tl.int64)
        factor = FACTOR + head * tokens

        # Terms through the state after the chunk.
        k = tile_of(K, count, k_stride, C, DK, True)
        through = tl.zeros((C, DK), tl.float32)
        both = tl.zeros((BV, BV), tl.float32)
        for block in tl.static_range(DV // BV):
            new = tile_of(NEW + head * DV + block * BV, count, v_heads * DV, C, BV, True)
            after = _state(AFTER + head * DK * DV + block * BV, DK, DV, BV)
            before = _state(BEFORE + head * DK * DV + block * BV, DK, DV, BV)
            through = tl.dot(new, tl.trans(after), through, input_precision=PRECISION)
            # The trace of this product is the product of the states: cheaper than elementwise.
            both = tl.dot(tl.trans(before), after, both, input_precision=PRECISION)
        total, whole = _total(factor, count, C)
        kept = factor_of(factor, KEPT, count, tokens, v_heads, C, True)
        strength = factor_of(factor, STRENGTH, count, tokens, v_heads, C, True)
        moved = kept * tl.sum(through * k.to(tl.float32), 1)
        ending = tl.sum(moved, 0) + tl.exp(whole) * _trace(both, BV)
        dk += through * (strength * tl.exp(whole - total))[:, None]

        # Terms through the state before the chunk. After the barrier k is loaded again: loaded
        # once, it would stay in registers, in float32.
        tl.debug_barrier()
        k = tile_of(K, count, k_stride, C, DK, True)
        through = tl.zeros((C, DK), tl.float32)
        for block in tl.static_range(DV // BV):
            dvalue = tile_of(DVALUE + head * DV + block * BV, count, v_heads * DV, C, BV, True)
            before = _state(BEFORE + head * DK * DV + block * BV, DK, DV, BV)
            through = tl.dot(dvalue, tl.trans(before), through, input_precision=PRECISION)
        read = factor_of(factor, READ, count, tokens, v_heads, C, True)
        dtotal = -moved - read * tl.sum(through * k.to(tl.float32), 1)
        dk -= through * tl.exp(total)[:, None]
        dg = tl.cumsum(dtotal, 0, reverse=True) + ending
        tl.store(DG + i * v_heads + head, dg, mask=i < count)
    k = tile_of(K, count, k_stride, C, DK, True)
    pairs = tile_of(BETWEEN + TO_K * matrix, count, C, C, C, True)
    dk = tl.dot(pairs, k, dk, input_precision=PRECISION)
    pairs = tl.trans(tile_of(BETWEEN + OF_K * matrix, count, C, C, C, True))
    dk = tl.dot(pairs, k, dk, input_precision=PRECISION)
    if OUTPUT:
        q = tile_of(Q, count, q_stride, C, DK, True)
        pairs = tl.trans(tile_of(BETWEEN + OF_Q * matrix, count, C, C, C, True))
        dk = tl.dot(pairs, q, dk, input_precision=PRECISION)
    factor = FACTOR + k_head.to(tl.int64) * GROUP * tokens
    norm = factor_of(factor, KEY, count, tokens, v_heads, C, True)
    return _unnormalized(dk, k, norm, 1.0)
