"""Gradients of the inputs from those of the scan, every chunk by itself: one kernel.

This file decides how they are collected: two programs per chunk and key head, one for q and
one for the rest, each of which adds up over the value heads that read the key head. They do
not wait for each other: both have a part in the gradient of g, and the parts are added
afterwards. The formulas are those of `chunked`, with one short cut: with ``Vn = beta D`` the
gradient of beta is the product of the residue's gradient with D. Needs Triton at import.

Four warps: with eight, Triton 3.6 gives products that feed products a layout of 128 rows, and
half of the card computes what the other half does.

Shapes: T tokens, M chunks of C tokens, Hk key heads of dk, Hv value heads of dv.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    tile_of,
)

#: (columns of v that are multiplied at a time, warps, stages).
CONFIG = (64, 4, 1)


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
        tables: the pack's.
    """
    new = scanned[0]
    (tokens, k_heads, dk), (v_heads, dv) = k.shape, new.shape[1:]
    dq, dk_, dbeta = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, beta)
    )
    dg = torch.empty(2, *g.shape, dtype=torch.float32, device=g.device)
    width, warps, stages = CONFIG
    launch(
        _gradients, (2 * k_heads, len(tables.chunks)),
        q, k, factors, new if do is None else do, *scanned, tables.chunks,
        dq, dk_, dg, dbeta,
        q.stride(0), k.stride(0), 0 if do is None else do.stride(0), tokens, v_heads,
        GROUP=v_heads // k_heads, DK=dk, DV=dv, BV=min(width, dv), C=CHUNK,
        OUTPUT=do is not None, PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk_, dg.sum(0).to(g.dtype), dbeta


@triton.jit(do_not_specialize=SAME)
def _gradients(
    Q, K, FACTOR, DO, NEW, DVALUE, BEFORE, AFTER, CHUNKS, DQ, DK_, DG, DBETA,
    q_stride, k_stride, do_stride, tokens, v_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head: even programs q, odd ones the rest."""
    chunk, k_head = tl.program_id(1).to(tl.int64), tl.program_id(0) // 2
    first, end = tl.load(CHUNKS + 2 * chunk).to(tl.int64), tl.load(CHUNKS + 2 * chunk + 1)
    count = tl.minimum(end - first, C).to(tl.int32)
    Q += first * q_stride + k_head * DK
    K += first * k_stride + k_head * DK
    FACTOR += first
    DO += first * do_stride
    NEW += first * v_heads * DV
    BEFORE += chunk * v_heads * DV * DK
    DG += first * v_heads
    valid = tl.arange(0, C) < count
    k_heads = v_heads // GROUP
    where = first * k_heads * DK + k_head * DK
    where += tl.arange(0, C)[:, None] * k_heads * DK + tl.arange(0, DK)[None, :]
    if tl.program_id(0) % 2 == 0:
        made = _of_queries(
            Q, K, FACTOR, DO, NEW, BEFORE, DG, k_head, count, q_stride, k_stride, do_stride,
            tokens, v_heads, GROUP, DK, DV, BV, C, OUTPUT, PRECISION,
        )  # fmt: skip
        tl.store(DQ + where, made.to(DQ.dtype.element_ty), mask=valid[:, None])
    else:
        made = _of_the_rest(
            Q, K, FACTOR, DO, NEW, DVALUE + first * v_heads * DV,
            BEFORE, AFTER + chunk * v_heads * DV * DK,
            DG + tokens.to(tl.int64) * v_heads, DBETA + first * v_heads,
            k_head, count, q_stride, k_stride, do_stride,
            tokens, v_heads, GROUP, DK, DV, BV, C, OUTPUT, PRECISION,
        )  # fmt: skip
        tl.store(DK_ + where, made.to(DK_.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _unnormalised(dx, x, norm, length):
    """Gradient of x from that of ``norm x``, which is `length` long."""
    x = x.to(tl.float32)
    along = tl.sum(dx * x, 1) * norm * norm / (length * length)
    return (dx - x * along[:, None]) * norm[:, None]


@triton.jit
def _trace(x, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    return tl.sum(tl.sum(tl.where(i[:, None] == i[None, :], x, 0.0), 1), 0)


@triton.jit
def _total(FACTOR, count, C: tl.constexpr):
    """G and its last; rows beyond the document take the last: 0 times infinity is none."""
    i = tl.arange(0, C)
    whole = tl.load(FACTOR + count - 1)
    return tl.where(i < count, tl.load(FACTOR + i, mask=i < count, other=0.0), whole), whole


@triton.jit
def _of_queries(
    Q, K, FACTOR, DO, NEW, BEFORE, DG, k_head, count, q_stride, k_stride, do_stride,
    tokens, v_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q; of g what comes through q."""
    i = tl.arange(0, C)
    valid = i < count
    head = k_head.to(tl.int64) * GROUP
    q_norm = factor_of(FACTOR + head * tokens, ASKED, count, tokens, v_heads, C, True)
    k_norm = factor_of(FACTOR + head * tokens, KEY, count, tokens, v_heads, C, True)
    dq = tl.zeros((C, DK), tl.float32)
    for member in range(GROUP):
        head = (k_head * GROUP + member).to(tl.int64)
        dtotal = tl.zeros((C,), tl.float32)
        if OUTPUT:
            factor = FACTOR + head * tokens
            total, _ = _total(factor, count, C)
            query = factor_of(factor, QUERY, count, tokens, v_heads, C, True)
            q = tile_of(Q, count, q_stride, C, DK, True)
            through = tl.zeros((C, DK), tl.float32)
            pairs = tl.zeros((C, C), tl.float32)
            for block in tl.static_range(DV // BV):
                column = head * DV + block * BV
                do = tile_of(DO + column, count, do_stride, C, BV, True).to(BEFORE.dtype.element_ty)
                new = tile_of(NEW + column, count, v_heads * DV, C, BV, True)
                before = tl.trans(_state(BEFORE + head * DK * DV + block * BV, DK, DV, BV))
                pairs = tl.dot(do, tl.trans(new), pairs, input_precision=PRECISION)
                through = tl.dot(do, before, through, input_precision=PRECISION)
            dtotal += query * tl.sum(through * q.to(tl.float32), 1)
            dq += through * tl.exp(total)[:, None]
            tl.debug_barrier()
            q = tile_of(Q, count, q_stride, C, DK, True)
            k = tile_of(K, count, k_stride, C, DK, True)
            strength = factor_of(factor, STRENGTH, count, tokens, v_heads, C, True)
            pairs *= decay(total, C) * (k_norm * strength)[None, :]
            carried = tl.dot(q, tl.trans(k), input_precision=PRECISION) * pairs
            carried = tl.where(i[:, None] > i[None, :], carried * q_norm[:, None], 0.0)
            dtotal += tl.sum(carried, 1) - tl.sum(carried, 0)
            dq = tl.dot(pairs.to(k.dtype), k, dq, input_precision=PRECISION)
        tl.store(DG + i * v_heads + head, tl.cumsum(dtotal, 0, reverse=True), mask=valid)
    return _unnormalised(dq, tile_of(Q, count, q_stride, C, DK, True), q_norm, DK**-0.5)


@triton.jit
def _of_the_rest(
    Q, K, FACTOR, DO, NEW, DVALUE, BEFORE, AFTER, DG, DBETA,
    k_head, count, q_stride, k_stride, do_stride, tokens, v_heads,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of k and beta; of g what does not come through q."""
    i = tl.arange(0, C)
    valid = i < count
    head = k_head.to(tl.int64) * GROUP
    q_norm = factor_of(FACTOR + head * tokens, ASKED, count, tokens, v_heads, C, True)
    k_norm = factor_of(FACTOR + head * tokens, KEY, count, tokens, v_heads, C, True)
    heads = tokens.to(tl.int64) * v_heads
    dk = tl.zeros((C, DK), tl.float32)
    for member in range(GROUP):
        head = (k_head * GROUP + member).to(tl.int64)
        factor = FACTOR + head * tokens
        total, whole = _total(factor, count, C)
        read = factor_of(factor, READ, count, tokens, v_heads, C, True)
        kept = factor_of(factor, KEPT, count, tokens, v_heads, C, True)
        strength = tl.load(factor + STRENGTH * heads + i, mask=valid, other=1.0)

        # Through what the chunk leaves behind.
        k = tile_of(K, count, k_stride, C, DK, True)
        through = tl.zeros((C, DK), tl.float32)
        both = tl.zeros((BV, BV), tl.float32)
        for block in tl.static_range(DV // BV):
            column = head * DV + block * BV
            new = tile_of(NEW + column, count, v_heads * DV, C, BV, True)
            after = _state(AFTER + head * DK * DV + block * BV, DK, DV, BV)
            through = tl.dot(new, tl.trans(after), through, input_precision=PRECISION)
            before = _state(BEFORE + head * DK * DV + block * BV, DK, DV, BV)
            # Its trace is the product of the states: cheaper than element by element.
            both = tl.dot(tl.trans(before), after, both, input_precision=PRECISION)
        moved = kept * tl.sum(through * k.to(tl.float32), 1)
        ending = tl.sum(moved, 0) + tl.exp(whole) * _trace(both, BV)
        dtotal = -moved
        dk += through * (strength * tl.exp(whole - total))[:, None]

        # Through what it reads of the state before. Behind a barrier tiles are fetched anew: what
        # would be fetched once would be held in registers, in float32.
        tl.debug_barrier()
        k = tile_of(K, count, k_stride, C, DK, True)
        through = tl.zeros((C, DK), tl.float32)
        for block in tl.static_range(DV // BV):
            column = head * DV + block * BV
            dvalue = tile_of(DVALUE + column, count, v_heads * DV, C, BV, True)
            before = _state(BEFORE + head * DK * DV + block * BV, DK, DV, BV)
            through = tl.dot(dvalue, tl.trans(before), through, input_precision=PRECISION)
        dtotal -= read * tl.sum(through * k.to(tl.float32), 1)
        dk -= through * tl.exp(total)[:, None]

        # Through the pairs of tokens of the chunk; beta.
        tl.debug_barrier()
        asked = tl.zeros((C, C), tl.float32)
        pairs = tl.zeros((C, C), tl.float32)
        for block in tl.static_range(DV // BV):
            column = head * DV + block * BV
            new = tl.trans(tile_of(NEW + column, count, v_heads * DV, C, BV, True))
            dvalue = tile_of(DVALUE + column, count, v_heads * DV, C, BV, True)
            pairs = tl.dot(dvalue, new, pairs, input_precision=PRECISION)
            if OUTPUT:
                do = tile_of(DO + column, count, do_stride, C, BV, True).to(dvalue.dtype)
                asked = tl.dot(do, new, asked, input_precision=PRECISION)
        k = tile_of(K, count, k_stride, C, DK, True)
        lower = decay(total, C)
        at = i * v_heads + head
        dbeta = tl.sum(tl.where(i[:, None] == i[None, :], pairs, 0.0), 1) / strength
        tl.store(DBETA + at, dbeta.to(DBETA.dtype.element_ty), mask=valid)
        strictly = tl.where(i[:, None] > i[None, :], lower, 0.0)
        pairs *= strictly * -strength[None, :]
        carried = tl.dot(k, tl.trans(k), input_precision=PRECISION) * pairs
        carried *= k_norm[:, None] * k_norm[None, :]
        dtotal += tl.sum(carried, 1) - tl.sum(carried, 0)
        # k_j as the column and as the row of its pairs.
        turned = tl.trans((pairs * k_norm[:, None]).to(k.dtype))
        dk = tl.dot((pairs * k_norm[None, :]).to(k.dtype), k, dk, input_precision=PRECISION)
        dk = tl.dot(turned, k, dk, input_precision=PRECISION)
        if OUTPUT:
            turned = tl.trans((asked * lower * q_norm[:, None] * strength[None, :]).to(k.dtype))
            q = tile_of(Q, count, q_stride, C, DK, True)
            dk = tl.dot(turned, q, dk, input_precision=PRECISION)
        tl.store(DG + at, tl.cumsum(dtotal, 0, reverse=True) + ending, mask=valid)
    return _unnormalised(dk, tile_of(K, count, k_stride, C, DK, True), k_norm, 1.0)


@triton.jit
def _state(POINTER, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr):
    """``[DK, BV]``: some columns of a state."""
    return tl.load(POINTER + tl.arange(0, DK)[:, None] * DV + tl.arange(0, BV)[None, :])
