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

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from . import reference
from .layout import Tables
from .triton_prepare import (
    CHUNK,
    KEPT,
    QUERY,
    READ,
    STRENGTH,
    decay,
    inverse_norm,
    precision,
    tile_of,
)

#: (warps, stages).
CONFIG = (4, 1)
#: Columns of v that are multiplied at a time: what registers hold beside the sums.
WIDTH = 64


def gradients(
    q: Tensor,
    k: Tensor,
    g: Tensor,
    beta: Tensor,
    factors: Tensor,
    do: Tensor | None,
    scanned: tuple[Tensor, Tensor, Tensor, Tensor],
    tables: Tables,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g and beta, each in its dtype.

    Args:
        q: ``[T, Hk, dk]``; k likewise; g, beta: ``[T, Hv]``.
        k: see q.
        g: see q.
        beta: see q.
        factors: ``[5, Hv, T]`` of `prepare`.
        do: ``[T, Hv, dv]``, or zeros.
        scanned: Vn, gradient of the residue, S, gradient of S'.
        tables: the pack's.
    """
    written = scanned[0]
    (tokens, k_heads, dk), (v_heads, dv) = k.shape, written.shape[1:]
    dq, dk_, dbeta = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, beta)
    )
    dg = torch.empty(2, *g.shape, dtype=torch.float32, device=g.device)
    dvalue = torch.empty_like(written)
    warps, stages = CONFIG
    launch(
        _gradients, (2 * k_heads, len(tables.chunks)),
        q, k, factors, written if do is None else do, *scanned, tables.chunks,
        dq, dk_, dvalue, dg, dbeta,
        q.stride(0), k.stride(0), 0 if do is None else do.stride(0), tokens, v_heads,
        reference.query_scale(dk),
        GROUP=v_heads // k_heads, DK=dk, DV=dv, BV=min(WIDTH, dv), C=CHUNK, EPS=reference.EPS,
        OUTPUT=do is not None, PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk_, dvalue, dg.sum(0).to(g.dtype), dbeta


@triton.jit
def _gradients(
    Q, K, FACTOR, DO, WRITTEN, DRESIDUE, BEFORE, AFTER, CHUNKS, DQ, DK_, DV_, DG, DBETA,
    q_stride, k_stride, do_stride, tokens, v_heads, scale,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    EPS: tl.constexpr, OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head: even programs q, odd ones the rest."""
    chunk, k_head = tl.program_id(1).to(tl.int64), tl.program_id(0) // 2
    first, end = tl.load(CHUNKS + 2 * chunk).to(tl.int64), tl.load(CHUNKS + 2 * chunk + 1)
    count = tl.minimum(end - first, C).to(tl.int32)
    Q += first * q_stride + k_head * DK
    K += first * k_stride + k_head * DK
    FACTOR += first
    DO += first * do_stride
    WRITTEN += first * v_heads * DV
    BEFORE += chunk * v_heads * DV * DK
    DG += first * v_heads
    valid = tl.arange(0, C) < count
    k_heads = v_heads // GROUP
    where = first * k_heads * DK + k_head * DK
    where += tl.arange(0, C)[:, None] * k_heads * DK + tl.arange(0, DK)[None, :]
    if tl.program_id(0) % 2 == 0:
        made = _of_queries(
            Q, K, FACTOR, DO, WRITTEN, BEFORE, DG, k_head, count, q_stride, k_stride, do_stride,
            tokens, v_heads, scale, GROUP, DK, DV, BV, C, EPS, OUTPUT, PRECISION,
        )  # fmt: skip
        tl.store(DQ + where, made.to(DQ.dtype.element_ty), mask=valid[:, None])
    else:
        made = _of_the_rest(
            Q, K, FACTOR, DO, WRITTEN, DRESIDUE + first * v_heads * DV,
            BEFORE, AFTER + chunk * v_heads * DV * DK, DV_ + first * v_heads * DV,
            DG + tokens.to(tl.int64) * v_heads, DBETA + first * v_heads,
            k_head, count, q_stride, k_stride, do_stride,
            tokens, v_heads, scale, GROUP, DK, DV, BV, C, EPS, OUTPUT, PRECISION,
        )  # fmt: skip
        tl.store(DK_ + where, made.to(DK_.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _unnormalised(dx, x, norm, scale):
    """Gradient of x from that of ``scale norm x``, where norm is `inverse_norm`."""
    unit = x.to(tl.float32) * norm[:, None]
    return (dx - unit * tl.sum(dx * unit, 1)[:, None]) * (norm * scale)[:, None]


@triton.jit
def _total(FACTOR, count, C: tl.constexpr):
    """G and its last; rows beyond the document take the last: 0 times infinity is none."""
    i = tl.arange(0, C)
    whole = tl.load(FACTOR + count - 1)
    return tl.where(i < count, tl.load(FACTOR + i, mask=i < count, other=0.0), whole), whole


@triton.jit
def _of_queries(
    Q, K, FACTOR, DO, WRITTEN, BEFORE, DG, k_head, count, q_stride, k_stride, do_stride,
    tokens, v_heads, scale,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    EPS: tl.constexpr, OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of q; of g what comes through q."""
    i = tl.arange(0, C)
    valid = i < count
    q_norm = inverse_norm(tile_of(Q, valid, q_stride, C, DK), EPS)
    k_norm = inverse_norm(tile_of(K, valid, k_stride, C, DK), EPS)
    heads = tokens.to(tl.int64) * v_heads
    dq = tl.zeros((C, DK), tl.float32)
    for member in range(GROUP):
        head = (k_head * GROUP + member).to(tl.int64)
        dtotal = tl.zeros((C,), tl.float32)
        if OUTPUT:
            # Fetched anew for every head: what does not change is held in registers, all of it.
            q = tile_of(Q, valid, q_stride, C, DK)
            k = tile_of(K, valid, k_stride, C, DK)
            factor = FACTOR + head * tokens
            total, _ = _total(factor, count, C)
            query = tl.load(factor + QUERY * heads + i, mask=valid, other=0.0)
            pairs = tl.zeros((C, C), tl.float32)
            for block in tl.static_range(DV // BV):
                column = head * DV + block * BV
                do = tile_of(DO + column, valid, do_stride, C, BV).to(q.dtype)
                new = tile_of(WRITTEN + column, valid, v_heads * DV, C, BV)
                before = _state(BEFORE + column * DK, BV, DK)
                pairs = tl.dot(do, tl.trans(new), pairs, input_precision=PRECISION)
                through = tl.dot(do, before, input_precision=PRECISION)
                dtotal += query * tl.sum(through * q.to(tl.float32), 1)
                dq += through * tl.exp(total)[:, None]
            pairs *= decay(total, C) * k_norm[None, :]
            carried = tl.dot(q, tl.trans(k), input_precision=PRECISION) * pairs
            carried = tl.where(i[:, None] > i[None, :], carried * (q_norm * scale)[:, None], 0.0)
            dtotal += tl.sum(carried, 1) - tl.sum(carried, 0)
            dq = tl.dot(pairs.to(k.dtype), k, dq, input_precision=PRECISION)
        tl.store(DG + i * v_heads + head, tl.cumsum(dtotal, 0, reverse=True), mask=valid)
    return _unnormalised(dq, tile_of(Q, valid, q_stride, C, DK), q_norm, scale)


@triton.jit
def _of_the_rest(
    Q, K, FACTOR, DO, WRITTEN, DRESIDUE, BEFORE, AFTER, DV_, DG, DBETA,
    k_head, count, q_stride, k_stride, do_stride, tokens, v_heads, scale,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    EPS: tl.constexpr, OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of k, v and beta; of g what does not come through q."""
    i = tl.arange(0, C)
    valid = i < count
    q_norm = inverse_norm(tile_of(Q, valid, q_stride, C, DK), EPS) * scale
    k_norm = inverse_norm(tile_of(K, valid, k_stride, C, DK), EPS)
    heads = tokens.to(tl.int64) * v_heads
    dk = tl.zeros((C, DK), tl.float32)
    for member in range(GROUP):
        head = (k_head * GROUP + member).to(tl.int64)
        k = tile_of(K, valid, k_stride, C, DK)
        factor = FACTOR + head * tokens
        total, whole = _total(factor, count, C)
        read = tl.load(factor + READ * heads + i, mask=valid, other=0.0)
        kept = tl.load(factor + KEPT * heads + i, mask=valid, other=0.0)
        strength = tl.load(factor + STRENGTH * heads + i, mask=valid, other=1.0)
        asked = tl.zeros((C, C), tl.float32)
        pairs = tl.zeros((C, C), tl.float32)
        dtotal = tl.zeros((C,), tl.float32)
        dbeta = tl.zeros((C,), tl.float32)
        ending = 0.0
        for block in tl.static_range(DV // BV):
            column = head * DV + block * BV
            new = tile_of(WRITTEN + column, valid, v_heads * DV, C, BV)
            dresidue = tile_of(DRESIDUE + column, valid, v_heads * DV, C, BV)
            wide = dresidue.to(tl.float32)
            dbeta += tl.sum(wide * new.to(tl.float32), 1)
            at = column + i[:, None] * v_heads * DV + tl.arange(0, BV)[None, :]
            value = (wide * strength[:, None]).to(DV_.dtype.element_ty)
            tl.store(DV_ + at, value, mask=valid[:, None])
            before = _state(BEFORE + column * DK, BV, DK)
            after = _state(AFTER + column * DK, BV, DK)
            through = before.to(tl.float32) * after.to(tl.float32)
            ending += tl.exp(whole) * tl.sum(tl.sum(through, 1), 0)
            if OUTPUT:
                do = tile_of(DO + column, valid, do_stride, C, BV).to(k.dtype)
                asked = tl.dot(do, tl.trans(new), asked, input_precision=PRECISION)
            pairs = tl.dot(dresidue, tl.trans(new), pairs, input_precision=PRECISION)
            through = tl.dot(new, after, input_precision=PRECISION)
            moved = kept * tl.sum(through * k.to(tl.float32), 1)
            ending += tl.sum(moved, 0)
            dtotal -= moved
            dk += through * (kept / k_norm)[:, None]
            through = tl.dot(dresidue, before, input_precision=PRECISION)
            dtotal -= strength * read * tl.sum(through * k.to(tl.float32), 1)
            dk -= through * (strength * tl.exp(total))[:, None]
        lower = decay(total, C)
        strictly = tl.where(i[:, None] > i[None, :], lower, 0.0)
        pairs *= strictly * -strength[:, None]
        carried = tl.dot(k, tl.trans(k), input_precision=PRECISION) * pairs
        carried *= k_norm[:, None] * k_norm[None, :]
        dtotal += tl.sum(carried, 1) - tl.sum(carried, 0)
        # k_j as the column and as the row of its pairs.
        turned = tl.trans((pairs * k_norm[:, None]).to(k.dtype))
        dk = tl.dot((pairs * k_norm[None, :]).to(k.dtype), k, dk, input_precision=PRECISION)
        dk = tl.dot(turned, k, dk, input_precision=PRECISION)
        if OUTPUT:
            turned = tl.trans((asked * lower * q_norm[:, None]).to(k.dtype))
            q = tile_of(Q, valid, q_stride, C, DK)
            dk = tl.dot(turned, q, dk, input_precision=PRECISION)
        at = i * v_heads + head
        tl.store(DBETA + at, (dbeta / strength).to(DBETA.dtype.element_ty), mask=valid)
        tl.store(DG + at, tl.cumsum(dtotal, 0, reverse=True) + ending, mask=valid)
    return _unnormalised(dk, tile_of(K, valid, k_stride, C, DK), k_norm, 1.0)


@triton.jit
def _state(POINTER, BV: tl.constexpr, DK: tl.constexpr):
    """``[BV, DK]``: some rows of a transposed state."""
    return tl.load(POINTER + tl.arange(0, BV)[:, None] * DK + tl.arange(0, DK)[None, :])
