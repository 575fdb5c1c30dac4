"""Gradients of the inputs from those of the scan, every chunk by itself: one kernel.

This file decides how they are collected: one program per chunk and key head, which adds up
over the value heads that read it, so nothing is summed between programs. The formulas are
those of `chunked`, with one short cut: with ``Vn = beta D`` the gradient of beta is the
product of the residue's gradient with D. Needs Triton at import.

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
    TOTAL,
    decay,
    inverse_norm,
    precision,
    rows_of,
)

#: (warps, stages).
CONFIG = (8, 1)


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
    dq, dk_, dg, dbeta = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, g, beta)
    )
    dvalue = torch.empty_like(written)
    warps, stages = CONFIG
    launch(
        _gradients, (len(tables.chunks), k_heads),
        q, k, factors, written if do is None else do, *scanned, tables.chunks,
        dq, dk_, dvalue, dg, dbeta,
        q.stride(0), k.stride(0), 0 if do is None else do.stride(0), tokens, v_heads,
        reference.query_scale(dk),
        GROUP=v_heads // k_heads, DK=dk, DV=dv, C=CHUNK, EPS=reference.EPS,
        OUTPUT=do is not None, PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dk_, dvalue, dg, dbeta


@triton.jit
def _gradients(
    Q, K, FACTOR, DO, WRITTEN, DRESIDUE, BEFORE, AFTER, CHUNKS, DQ, DK_, DV_, DG, DBETA,
    q_stride, k_stride, do_stride, tokens, v_heads, scale,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head."""
    chunk, k_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, end = tl.load(CHUNKS + 2 * chunk).to(tl.int64), tl.load(CHUNKS + 2 * chunk + 1)
    i = tl.arange(0, C)
    rows = first + i
    valid = rows < end
    strictly = i[:, None] > i[None, :]
    q_at = Q + k_head * DK
    k_at = K + k_head * DK
    k = rows_of(k_at, rows, valid, k_stride, DK)
    k_norm = inverse_norm(k, EPS)
    q_norm = inverse_norm(rows_of(q_at, rows, valid, q_stride, DK), EPS)
    dq = tl.zeros((C, DK), tl.float32)
    dk = tl.zeros((C, DK), tl.float32)
    heads = tokens.to(tl.int64) * v_heads
    for member in range(GROUP):
        head = (k_head * GROUP + member).to(tl.int64)
        factor = FACTOR + head * tokens + rows
        whole = tl.load(FACTOR + head * tokens + tl.minimum(first + C, end) - 1)
        # Of rows beyond the document the decay must not grow: 0 times infinity is none.
        total = tl.load(factor + TOTAL * heads, mask=valid, other=0.0)
        total = tl.where(valid, total, whole)
        read = tl.load(factor + READ * heads, mask=valid, other=0.0)
        kept = tl.load(factor + KEPT * heads, mask=valid, other=0.0)
        query = tl.load(factor + QUERY * heads, mask=valid, other=0.0)
        strength = tl.load(factor + STRENGTH * heads, mask=valid, other=1.0)
        lower = decay(total, C)
        tile = ((chunk * v_heads + head) * DV + tl.arange(0, DV)[:, None]) * DK
        tile += tl.arange(0, DK)[None, :]
        before = tl.load(BEFORE + tile)
        after = tl.load(AFTER + tile)
        end_g = tl.exp(whole) * tl.sum(tl.sum(before.to(tl.float32) * after.to(tl.float32), 1), 0)
        new = rows_of(WRITTEN + head * DV, rows, valid, v_heads * DV, DV)

        through = tl.dot(new, after, input_precision=PRECISION)
        k = rows_of(k_at, rows, valid, k_stride, DK)
        moved = kept * tl.sum(through * k.to(tl.float32), 1)
        dtotal = -moved
        dk += through * (kept / k_norm)[:, None]

        dresidue = rows_of(DRESIDUE + head * DV, rows, valid, v_heads * DV, DV)
        through = tl.dot(dresidue, before, input_precision=PRECISION)
        dtotal -= strength * read * tl.sum(through * k.to(tl.float32), 1)
        dk -= through * (strength * tl.exp(total))[:, None]

        pairs = tl.dot(dresidue, tl.trans(new), input_precision=PRECISION) * lower
        pairs = tl.where(strictly, pairs * -strength[:, None], 0.0) * k_norm[None, :]
        carried = tl.dot(k, tl.trans(k), input_precision=PRECISION) * pairs * k_norm[:, None]
        dtotal += tl.sum(carried, 1) - tl.sum(carried, 0)
        mutual = (pairs + tl.trans(pairs) * (k_norm[None, :] / k_norm[:, None])).to(k.dtype)
        dk = tl.dot(mutual, k, dk, input_precision=PRECISION)

        wide = dresidue.to(tl.float32)
        where = rows[:, None] * v_heads * DV + head * DV + tl.arange(0, DV)[None, :]
        value = (wide * strength[:, None]).to(DV_.dtype.element_ty)
        tl.store(DV_ + where, value, mask=valid[:, None])
        dbeta = tl.sum(wide * new.to(tl.float32), 1) / strength
        at = rows * v_heads + head
        tl.store(DBETA + at, dbeta.to(DBETA.dtype.element_ty), mask=valid)

        if OUTPUT:
            do = rows_of(DO + head * DV, rows, valid, do_stride, DV).to(new.dtype)
            q = rows_of(q_at, rows, valid, q_stride, DK)
            through = tl.dot(do, before, input_precision=PRECISION)
            dtotal += query * tl.sum(through * q.to(tl.float32), 1)
            dq += through * tl.exp(total)[:, None]
            pairs = tl.dot(do, tl.trans(new), input_precision=PRECISION) * lower
            carried = tl.dot(q, tl.trans(k), input_precision=PRECISION) * pairs
            carried *= (q_norm * scale)[:, None] * k_norm[None, :]
            carried = tl.where(strictly, carried, 0.0)
            dtotal += tl.sum(carried, 1) - tl.sum(carried, 0)
            dq = tl.dot((pairs * k_norm[None, :]).to(k.dtype), k, dq, input_precision=PRECISION)
            turned = tl.trans((pairs * (q_norm * scale)[:, None]).to(k.dtype))
            dk = tl.dot(turned, q, dk, input_precision=PRECISION)

        dg = tl.cumsum(dtotal, 0, reverse=True) + tl.sum(moved, 0) + end_g
        tl.store(DG + at, dg.to(DG.dtype.element_ty), mask=valid)

    k_heads = v_heads // GROUP
    where = (rows[:, None] * k_heads + k_head) * DK + tl.arange(0, DK)[None, :]
    unit = rows_of(q_at, rows, valid, q_stride, DK).to(tl.float32) * q_norm[:, None]
    dq = (dq - unit * tl.sum(dq * unit, 1)[:, None]) * (q_norm * scale)[:, None]
    tl.store(DQ + where, dq.to(DQ.dtype.element_ty), mask=valid[:, None])
    unit = rows_of(k_at, rows, valid, k_stride, DK).to(tl.float32) * k_norm[:, None]
    dk = (dk - unit * tl.sum(dk * unit, 1)[:, None]) * k_norm[:, None]
    tl.store(DK_ + where, dk.to(DK_.dtype.element_ty), mask=valid[:, None])
