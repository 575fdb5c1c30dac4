"""Scan kernels of the Triton delta rule: states through the chunks of a pack, forward and backward.

This file decides the parallelism: one program per document, value head and some columns of v. It
computes rows of tokens by its columns, so a token's factors are a few numbers per thread, and the
left side of every product is a prefetched tile. In backward the states are recomputed forward while
their gradients run from the end, in the same launch: they are independent, and either alone leaves
half of a GPU idle on a single document. Importing this file imports Triton.

A step exists in two versions: full chunks need no masks, which would be a third of their work; only
the last chunk of a document may be partial. Values that are too small for the compiler to prefetch
are prefetched by hand (`whole`).

The formulas are those of `triton_prepare`; in the forward, D is multiplied into its matrices.

Shapes: T tokens, M chunks of C tokens, N documents, Hk key heads of dk, Hv value heads of dv.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
from __future__ import annotations

import torch
from torch import Tensor

from qcore.ops import tl, triton

from ..launch import launch
from .layout import Tables
from .triton_prepare import (
    CHUNK,
    KEPT,
    QUERY,
    READ,
    SAME,
    Prepared,
    factor_of,
    precision,
    put,
    tile_of,
)

#: (columns of v per program, warps, stages) by kernel. With 32 columns one document of 32 heads
#: occupies the GPU, and two programs fit on a multiprocessor.
CONFIG = {"outputs": (32, 4, 2), "states": (32, 4, 2)}


def outputs(
    q: Tensor, k: Tensor, v: Tensor, made: Prepared, initial: Tensor | None, tables: Tables
) -> tuple[Tensor, Tensor]:
    """Outputs ``[T, Hv, dv]`` in the dtype of v and last states ``[N, Hv, dk, dv]`` in float32."""
    (tokens, k_heads, dk), (v_heads, dv) = k.shape, v.shape[1:]
    documents = len(tables.documents)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty(documents, v_heads, dk, dv, dtype=torch.float32, device=v.device)
    width, warps, stages = CONFIG["outputs"]
    width = min(width, dv)
    launch(
        _outputs, (documents * v_heads * (dv // width),),
        q, k, v, *made, tables.documents, last if initial is None else initial, o, last,
        q.stride(0), k.stride(0), v.stride(0), tokens, v_heads, int(initial is not None),
        GROUP=v_heads // k_heads, DK=dk, DV=dv, C=CHUNK, BV=width,
        PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
        flops=2 * tokens * v_heads * dv * (3 * dk + 2 * CHUNK), share=0.1,
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
    """Backward scan: the tensors from which `triton_gradients` computes the gradients.

    Args:
        q: ``[T, Hk, dk]``; k likewise; v: ``[T, Hv, dv]``.
        k: see q.
        v: see q.
        made: result of `prepare`.
        initial: ``[N, Hv, dk, dv]``, or zeros.
        tables: tables of the pack.
        do: ``[T, Hv, dv]``, or zeros.
        dlast: ``[N, Hv, dk, dv]`` gradient of the last states, or zeros.

    Returns:
        In the dtype of v: D and the gradient of v, ``[T, Hv, dv]``; S and the gradient of S',
        ``[M, Hv, dk, dv]``. In float32 the gradient of `initial`
        (``[N, Hv, dk, dv]``; empty without one).
    """
    (tokens, k_heads, dk), (v_heads, dv) = k.shape, v.shape[1:]
    documents, chunks = len(tables.documents), len(tables.chunks)
    new = torch.empty_like(v, memory_format=torch.contiguous_format)
    dvalue = torch.empty_like(new)
    before, after = (v.new_empty(chunks, v_heads, dk, dv) for _ in range(2))
    shape = (0,) if initial is None else (documents, v_heads, dk, dv)
    dfirst = torch.empty(shape, dtype=torch.float32, device=v.device)
    width, warps, stages = CONFIG["states"]
    width = min(width, dv)
    launch(
        _states, (2 * documents * v_heads * (dv // width),),
        q, k, v, *made, tables.documents, dfirst if initial is None else initial,
        v if do is None else do, dfirst if dlast is None else dlast,
        new, dvalue, before, after, dfirst,
        q.stride(0), k.stride(0), v.stride(0), 0 if do is None else do.stride(0), tokens, v_heads,
        int(initial is not None), int(dlast is not None),
        GROUP=v_heads // k_heads, DK=dk, DV=dv, C=CHUNK, BV=width,
        OUTPUT=do is not None,
        PRECISION=precision(q.dtype), num_warps=warps, num_stages=stages,
        flops=2 * tokens * v_heads * dv * (5 * dk + 3 * CHUNK), share=0.15,
    )  # fmt: skip
    return new, dvalue, before, after, dfirst


@triton.jit(do_not_specialize=SAME)
def _outputs(
    Q, K, V, A, P, FACTOR, DOCUMENTS, FIRST, OUT, LAST,
    q_stride, k_stride, v_stride, tokens, v_heads, given_first,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward scan: outputs and last state."""
    blocks: tl.constexpr = DV // BV
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, entry = (pair % v_heads).to(tl.int64), pair // v_heads
    start = tl.load(DOCUMENTS + 4 * entry).to(tl.int64)
    length = (tl.load(DOCUMENTS + 4 * entry + 1) - start).to(tl.int32)
    document = tl.load(DOCUMENTS + 4 * entry + 3).to(tl.int64)
    Q += start * q_stride + head // GROUP * DK
    K += start * k_stride + head // GROUP * DK
    V += start * v_stride + head * DV + block * BV
    A += (head * tokens + start) * C
    P += (head * tokens + start) * C
    FACTOR += head * tokens + start
    OUT += (start * v_heads + head) * DV + block * BV
    columns = block * BV + tl.arange(0, BV)
    at = (document * v_heads + head) * DK * DV + tl.arange(0, DK)[:, None] * DV + columns[None, :]
    state = tl.zeros((DK, BV), tl.float32)
    if given_first != 0:
        state += tl.load(FIRST + at).to(tl.float32)
    full = length // C
    if full > 0:
        whole = tl.load(FACTOR + C - 1)
        for step in range(full):
            whole_ahead = tl.load(FACTOR + tl.minimum(step + 1, full - 1) * C - step * C + C - 1)
            state = _output(
                state, Q, K, V, A, P, FACTOR, OUT, whole, C, q_stride, k_stride, v_stride,
                tokens, v_heads, DK, DV, C, BV, False, PRECISION,
            )  # fmt: skip
            whole = whole_ahead
            Q += C * q_stride
            K += C * k_stride
            V += C * v_stride
            A += C * C
            P += C * C
            FACTOR += C
            OUT += C * v_heads * DV
    rest = length - full * C
    # A loop of at most one step: as a branch, Triton 3.6 computes a wrong last state on Hopper if a
    # program has 32 columns and more than 16 tokens are left.
    for _ in range(tl.minimum(rest, 1)):
        state = _output(
            state, Q, K, V, A, P, FACTOR, OUT, tl.load(FACTOR + rest - 1), rest,
            q_stride, k_stride, v_stride, tokens, v_heads, DK, DV, C, BV, True, PRECISION,
        )  # fmt: skip
    tl.store(LAST + at, state)


@triton.jit
def _output(
    state, Q, K, V, A, P, FACTOR, OUT, whole, count, q_stride, k_stride, v_stride,
    tokens, v_heads, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of the forward scan; returns the state after it."""
    k = tile_of(K, count, k_stride, C, DK, MASKED)
    rounded = state.to(k.dtype)
    residue = _residue(
        rounded, k, V, FACTOR, count, v_stride, tokens, v_heads, C, BV, MASKED, PRECISION
    )
    q = tile_of(Q, count, q_stride, C, DK, MASKED)
    query = factor_of(FACTOR, QUERY, count, tokens, v_heads, C, MASKED)
    out = tl.dot(q, rounded, input_precision=PRECISION) * query[:, None]
    scores = tile_of(P, count, C, C, C, MASKED)
    out = tl.dot(scores, residue, out, input_precision=PRECISION)
    put(OUT, out, count, v_heads * DV, C, BV, MASKED)
    inverse = tile_of(A, count, C, C, C, MASKED)
    kept = tl.dot(inverse, residue, input_precision=PRECISION).to(k.dtype)
    state = state * tl.exp(whole)
    return tl.dot(tl.trans(k), kept, state, input_precision=PRECISION)


@triton.jit
def _residue(
    rounded, k, V, FACTOR, count, v_stride, tokens, v_heads,
    C: tl.constexpr, BV: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``V - exp(G) K S``."""
    seen = tl.dot(k, rounded, input_precision=PRECISION)
    v = tile_of(V, count, v_stride, C, BV, MASKED).to(tl.float32)
    read = factor_of(FACTOR, READ, count, tokens, v_heads, C, MASKED)
    return (v - seen * read[:, None]).to(k.dtype)


@triton.jit(do_not_specialize=SAME)
def _states(
    Q, K, V, A, P, FACTOR, DOCUMENTS, FIRST, DO, DLAST, NEW, DVALUE, BEFORE, AFTER, DFIRST,
    q_stride, k_stride, v_stride, do_stride, tokens, v_heads, given_first, given_last,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward scan: odd programs recompute states, even programs compute their gradients."""
    blocks: tl.constexpr = DV // BV
    forwards, rest = tl.program_id(0) % 2, tl.program_id(0) // 2
    block, pair = rest % blocks, rest // blocks
    head, entry = (pair % v_heads).to(tl.int64), pair // v_heads
    start = tl.load(DOCUMENTS + 4 * entry).to(tl.int64)
    length = (tl.load(DOCUMENTS + 4 * entry + 1) - start).to(tl.int32)
    first_chunk = tl.load(DOCUMENTS + 4 * entry + 2).to(tl.int64)
    document = tl.load(DOCUMENTS + 4 * entry + 3).to(tl.int64)
    K += start * k_stride + head // GROUP * DK
    A += (head * tokens + start) * C
    FACTOR += head * tokens + start
    column = head * DV + block * BV
    columns = block * BV + tl.arange(0, BV)
    d = tl.arange(0, DK)
    at = (document * v_heads + head) * DK * DV + d[:, None] * DV + columns[None, :]
    tile = (first_chunk * v_heads + head) * DK * DV + block * BV
    state = tl.zeros((DK, BV), tl.float32)
    if forwards == 1:
        if given_first != 0:
            state += tl.load(FIRST + at).to(tl.float32)
        _forwards(
            state, K, V + start * v_stride + column, A, FACTOR, NEW + start * v_heads * DV + column,
            BEFORE + tile, length, k_stride, v_stride, tokens, v_heads, DK, DV, C, BV, PRECISION,
        )  # fmt: skip
    else:
        if given_last != 0:
            state += tl.load(DLAST + at).to(tl.float32)
        Q += start * q_stride + head // GROUP * DK
        P += (head * tokens + start) * C
        state = _backwards(
            state, Q, K, A, P, FACTOR, DO + start * do_stride + column,
            DVALUE + start * v_heads * DV + column, AFTER + tile, length,
            q_stride, k_stride, do_stride, tokens, v_heads, DK, DV, C, BV, OUTPUT, PRECISION,
        )  # fmt: skip
        if given_first != 0:
            tl.store(DFIRST + at, state)


@triton.jit
def _forwards(
    state, K, V, A, FACTOR, NEW, BEFORE, length, k_stride, v_stride, tokens, v_heads,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Like `_outputs`, but stores S and D instead of o."""
    full = length // C
    if full > 0:
        whole = tl.load(FACTOR + C - 1)
        for step in range(full):
            whole_ahead = tl.load(FACTOR + tl.minimum(step + 1, full - 1) * C - step * C + C - 1)
            state = _forward(
                state, K, V, A, FACTOR, NEW, BEFORE, whole, C, k_stride, v_stride, tokens, v_heads,
                DK, DV, C, BV, False, PRECISION,
            )  # fmt: skip
            whole = whole_ahead
            K += C * k_stride
            V += C * v_stride
            A += C * C
            FACTOR += C
            NEW += C * v_heads * DV
            BEFORE += v_heads * DV * DK
    rest = length - full * C
    if rest > 0:
        _forward(
            state, K, V, A, FACTOR, NEW, BEFORE, tl.load(FACTOR + rest - 1), rest,
            k_stride, v_stride, tokens, v_heads, DK, DV, C, BV, True, PRECISION,
        )  # fmt: skip


@triton.jit
def _forward(
    state, K, V, A, FACTOR, NEW, BEFORE, whole, count, k_stride, v_stride, tokens, v_heads,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk; returns the state after it."""
    k = tile_of(K, count, k_stride, C, DK, MASKED)
    rounded = state.to(k.dtype)
    put(BEFORE, rounded, DK, DV, DK, BV, False)
    residue = _residue(
        rounded, k, V, FACTOR, count, v_stride, tokens, v_heads, C, BV, MASKED, PRECISION
    )
    inverse = tile_of(A, count, C, C, C, MASKED)
    new = tl.dot(inverse, residue, input_precision=PRECISION)
    put(NEW, new, count, v_heads * DV, C, BV, MASKED)
    kept = factor_of(FACTOR, KEPT, count, tokens, v_heads, C, MASKED)
    state = state * tl.exp(whole)
    kept = (new * kept[:, None]).to(k.dtype)
    return tl.dot(tl.trans(k), kept, state, input_precision=PRECISION)


@triton.jit
def _backwards(
    dstate, Q, K, A, P, FACTOR, DO, DVALUE, AFTER, length,
    q_stride, k_stride, do_stride, tokens, v_heads,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of S' per chunk and of v; returns the gradient of the first state."""
    full = length // C
    skipped = full.to(tl.int64) * C
    Q += skipped * q_stride
    K += skipped * k_stride
    A += skipped * C
    P += skipped * C
    FACTOR += skipped
    DO += skipped * do_stride
    DVALUE += skipped * v_heads * DV
    AFTER += full.to(tl.int64) * v_heads * DV * DK
    rest = length - full * C
    if rest > 0:
        dstate = _backward(
            dstate, Q, K, A, P, FACTOR, DO, DVALUE, AFTER, tl.load(FACTOR + rest - 1), rest,
            q_stride, k_stride, do_stride, tokens, v_heads, DK, DV, C, BV, True, OUTPUT, PRECISION,
        )  # fmt: skip
    if full > 0:
        whole = tl.load(FACTOR - 1)
        for step in range(full):
            Q -= C * q_stride
            K -= C * k_stride
            A -= C * C
            P -= C * C
            FACTOR -= C
            DO -= C * do_stride
            DVALUE -= C * v_heads * DV
            AFTER -= v_heads * DV * DK
            ahead = FACTOR - tl.minimum(1, full - 1 - step) * C
            whole_ahead = tl.load(ahead + C - 1)
            dstate = _backward(
                dstate, Q, K, A, P, FACTOR, DO, DVALUE, AFTER, whole, C, q_stride, k_stride,
                do_stride, tokens, v_heads, DK, DV, C, BV, False, OUTPUT, PRECISION,
            )  # fmt: skip
            whole = whole_ahead
    return dstate


@triton.jit
def _backward(
    dstate, Q, K, A, P, FACTOR, DO, DVALUE, AFTER, whole, count,
    q_stride, k_stride, do_stride, tokens, v_heads,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, MASKED: tl.constexpr,
    OUTPUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk; returns the gradient of the state before it."""
    k = tile_of(K, count, k_stride, C, DK, MASKED)
    rounded = dstate.to(k.dtype)
    put(AFTER, rounded, DK, DV, DK, BV, False)
    kept = factor_of(FACTOR, KEPT, count, tokens, v_heads, C, MASKED)
    dnew = tl.dot(k, rounded, input_precision=PRECISION) * kept[:, None]
    dstate = dstate * tl.exp(whole)
    if OUTPUT:
        do = tile_of(DO, count, do_stride, C, BV, MASKED).to(k.dtype)
        scores = tile_of(P, count, C, C, C, MASKED)
        dnew = tl.dot(tl.trans(scores), do, dnew, input_precision=PRECISION)
        q = tile_of(Q, count, q_stride, C, DK, MASKED)
        query = factor_of(FACTOR, QUERY, count, tokens, v_heads, C, MASKED)
        asked = (do.to(tl.float32) * query[:, None]).to(k.dtype)
        dstate = tl.dot(tl.trans(q), asked, dstate, input_precision=PRECISION)
    inverse = tile_of(A, count, C, C, C, MASKED)
    dvalue = tl.dot(tl.trans(inverse), dnew.to(k.dtype), input_precision=PRECISION)
    put(DVALUE, dvalue, count, v_heads * DV, C, BV, MASKED)
    read = factor_of(FACTOR, READ, count, tokens, v_heads, C, MASKED)
    taken = (dvalue * -read[:, None]).to(k.dtype)
    return tl.dot(tl.trans(k), taken, dstate, input_precision=PRECISION)
