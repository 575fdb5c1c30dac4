"""The gated delta rule in Triton, for decoding: token by token, one launch per layer.

This file decides that the state is read and written once for any number of tokens, and updated in
place: the argument is also the result, so that its address stays valid in a captured CUDA graph.
Same signature and results as `reference.recurrent_delta_rule`, without a backward. Importing this
file imports Triton.

Shapes: T tokens of N documents, Hk key heads of dk, Hv value heads of dv.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from qcore.ops import tl, triton

from .. import limits
from ..launch import launch, supported
from . import reference
from .layout import Tables

#: (columns of v per program, warps).
CONFIG = (32, 4)


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Sequence[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `reference.recurrent_delta_rule`.

    Args:
        q: ``[T, Hk, dk]``, not yet normalized; any stride between tokens.
        k: ``[T, Hk, dk]``, likewise.
        v: ``[T, Hv, dv]``, likewise.
        g: ``[T, Hv]`` log decay, at most 0.
        beta: ``[T, Hv]`` write strength.
        cu_seqlens: ``N + 1`` cumulative lengths.
        initial_state: ``[N, Hv, dk, dv]``, or zeros; updated in place if it is float32 and
            contiguous.

    Raises:
        UsageError: ``QC-KERNEL-003`` a head size that is not a power of two.
        ValueError: an unsupported dtype.
    """
    supported(q, k, v)
    (tokens, k_heads, dk), (v_heads, dv) = k.shape, v.shape[1:]
    limits.check("qwen35::delta_step", limits.step_heads(dk, dv))
    documents = len(cu_seqlens) - 1
    if initial_state is None:
        state = torch.zeros(documents, v_heads, dk, dv, dtype=torch.float32, device=v.device)
    else:
        state = initial_state.float().contiguous()
    o = torch.empty(tokens, v_heads, dv, dtype=v.dtype, device=v.device)
    lengths = {end - start for start, end in pairwise(cu_seqlens)}
    # Documents of equal length, as in decoding, need no table and no copy to the device.
    same = len(lengths) == 1
    table = state if same else Tables.of(cu_seqlens, max(tokens, 1), v.device).documents
    width, warps = CONFIG
    width = min(width, dv)
    launch(
        _step, (documents * v_heads * (dv // width),),
        q, k, v, g, beta, table, state, o,
        q.stride(0), k.stride(0), v.stride(0), g.stride(0), beta.stride(0),
        lengths.pop() if same else 0, v_heads, reference.query_scale(dk),
        GROUP=v_heads // k_heads, DK=dk, DV=dv, BV=width, EPS=reference.EPS, SAME=same,
        num_warps=warps,
    )  # fmt: skip
    return o, state


@triton.jit
def _normalized(POINTER, DK: tl.constexpr, EPS: tl.constexpr):
    x = tl.load(POINTER + tl.arange(0, DK)).to(tl.float32)
    return x / tl.sqrt(tl.sum(x * x, 0) + EPS)


@triton.jit(do_not_specialize=("length",))
def _step(
    Q, K, V, G, BETA, DOCUMENTS, STATE, OUT,
    q_stride, k_stride, v_stride, g_stride, beta_stride, length, v_heads, scale,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
    EPS: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Process all tokens of one document, for some columns of one value head."""
    blocks: tl.constexpr = DV // BV
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, entry = pair % v_heads, (pair // v_heads).to(tl.int64)
    if SAME:
        document, start = entry, entry * length
    else:
        start = tl.load(DOCUMENTS + 4 * entry).to(tl.int64)
        length = (tl.load(DOCUMENTS + 4 * entry + 1) - start).to(tl.int32)
        document = tl.load(DOCUMENTS + 4 * entry + 3).to(tl.int64)
    columns = block * BV + tl.arange(0, BV)
    at = STATE + (document * v_heads + head) * DK * DV
    at += tl.arange(0, DK)[:, None] * DV + columns[None, :]
    state = tl.load(at)
    for step in range(length):
        token = start + step
        q = _normalized(Q + token * q_stride + head // GROUP * DK, DK, EPS) * scale
        k = _normalized(K + token * k_stride + head // GROUP * DK, DK, EPS)
        v = tl.load(V + token * v_stride + head * DV + columns).to(tl.float32)
        beta = tl.load(BETA + token * beta_stride + head).to(tl.float32)
        state *= tl.exp(tl.load(G + token * g_stride + head).to(tl.float32))
        write = beta * (v - tl.sum(k[:, None] * state, 0))
        state += k[:, None] * write[None, :]
        out = tl.sum(q[:, None] * state, 0)
        tl.store(OUT + (token * v_heads + head) * DV + columns, out.to(OUT.dtype.element_ty))
    tl.store(at, state)
