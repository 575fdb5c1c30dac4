"""First kernel of the Triton delta rule: everything in a chunk that does not depend on the scan.

This file decides how the inverse of a chunk's system is computed on a GPU and which factors are
stored per token. The formulas are those of `chunked`; `triton_scan` and `triton_gradients` use the
results. Importing this file imports Triton.

With D for Vn of `chunked` before the multiplication by beta, beta scales columns::

    A = inverse(I + strictly_lower(k_i.k_j L_ij beta_j)),   D = A (V - exp(G) K S)
    P = lower(q_i.k_j L_ij beta_j),   o = exp(G) Q S + P D,   Kd = beta exp(G_C - G) K

Then the gradient of the residue is that of v, and that of beta is its product with D over beta.

q and k are never stored normalized: their lengths are row factors, combined with the decays in
float32. Each token of a value head has seven factors (`Prepared.factors`).

The inverse of a unit lower triangular matrix is built by doubling: with the inverse D of the
diagonal blocks of size s and the adjacent part F of the system, the inverse blocks of size 2 s are
``D - D F D``. Powers of the system would need fewer products, but overflow if keys are equal; the
elements of the system and of these inverses never exceed one, because a step of the rule lengthens
no key.

Shapes: T tokens, M chunks of C tokens, Hk key heads of dk, Hv value heads of dv.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qcore.ops import tl, triton

from ..launch import launch
from . import reference
from .layout import Tables

CHUNK = 64
#: (warps, stages, registers per thread): with 128 registers, which allow four programs at a time,
#: the kernel spills, which costs more than it gains.
CONFIG = (4, 1, 255)

#: Lower bound of write strengths: a gradient is divided by the strength, and the effect of a
#: strength of 1e-12 is negligible.
WEAKEST = tl.constexpr(1e-12)

TOTAL = tl.constexpr(0)  #: G, the sum of g from the chunk's start
READ = tl.constexpr(1)  #: exp(G) / |k|
KEPT = tl.constexpr(2)  #: beta exp(G_C - G) / |k|
QUERY = tl.constexpr(3)  #: exp(G) scale / |q|
STRENGTH = tl.constexpr(4)  #: beta
KEY = tl.constexpr(5)  #: 1 / |k|
ASKED = tl.constexpr(6)  #: scale / |q|
FACTORS = 7

#: Arguments that Triton must not specialize on: one compiled kernel serves all packs and models.
SAME = ("tokens", "v_heads", "g_stride", "beta_stride", "given_first", "given_last")


class Prepared(NamedTuple):
    """Attributes.

    inverse: ``[Hv, T, C]`` A, a row per token, in the dtype of q; for the forward each row is
        multiplied by the token's `KEPT` factor.
    scores: ``[Hv, T, C]`` P, likewise; for the forward P A.
    factors: ``[7, Hv, T]`` float32.
    """

    inverse: Tensor
    scores: Tensor
    factors: Tensor


def prepare(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor, tables: Tables, *, forward: bool
) -> Prepared:
    """Inverse, scores and factors of every chunk.

    Args:
        q: ``[T, Hk, dk]``, any stride between tokens.
        k: ``[T, Hk, dk]``, likewise.
        g: ``[T, Hv]`` log decay.
        beta: ``[T, Hv]`` write strength.
        tables: tables of the pack.
        forward: prepare for the forward, which does not need D itself.
    """
    tokens, k_heads, dk = k.shape
    v_heads = g.shape[1]
    made = Prepared(
        q.new_empty(v_heads, tokens, CHUNK),
        q.new_empty(v_heads, tokens, CHUNK),
        torch.empty(FACTORS, v_heads, tokens, dtype=torch.float32, device=q.device),
    )
    warps, stages, registers = CONFIG
    launch(
        _prepare, (v_heads, len(tables.chunks)),
        q, k, g, beta, tables.chunks, *made, q.stride(0), k.stride(0), g.stride(0), beta.stride(0),
        tokens, v_heads, reference.query_scale(dk),
        GROUP=v_heads // k_heads, DK=dk, C=CHUNK, EPS=reference.EPS,
        PRECISION=precision(q.dtype), EXACT=q.dtype == torch.float32,
        FORWARD=forward,
        num_warps=warps, num_stages=stages, maxnreg=registers,
    )  # fmt: skip
    return made


def precision(dtype: torch.dtype) -> str:
    """Precision of the products of `dtype`: three tf32 products for float32."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@triton.jit
def tile_of(POINTER, count, stride, C: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Load ``[C, WIDTH]`` consecutive rows, zeros from row `count` on."""
    i = tl.arange(0, C)[:, None]
    at = POINTER + i * stride + tl.arange(0, WIDTH)[None, :]
    if MASKED:
        return tl.load(at, mask=i < count, other=0.0)
    return tl.load(at)


@triton.jit
def factor_of(
    FACTOR, NUMBER: tl.constexpr, count, tokens, v_heads, C: tl.constexpr, MASKED: tl.constexpr
):
    """Load one factor of a chunk ``[C]``, zeros from row `count` on."""
    i = tl.arange(0, C)
    at = FACTOR + NUMBER * tokens.to(tl.int64) * v_heads + i
    if MASKED:
        return tl.load(at, mask=i < count, other=0.0)
    return tl.load(at)


@triton.jit
def put(POINTER, x, count, stride, C: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Store ``[C, WIDTH]``: the inverse of `tile_of`."""
    i = tl.arange(0, C)[:, None]
    at = POINTER + i * stride + tl.arange(0, WIDTH)[None, :]
    x = x.to(POINTER.dtype.element_ty)
    if MASKED:
        tl.store(at, x, mask=i < count)
    else:
        tl.store(at, x)


@triton.jit
def inverse_norm(x, EPS: tl.constexpr):
    """``[C, d] -> [C]``."""
    x = x.to(tl.float32)
    return 1 / tl.sqrt(tl.sum(x * x, 1) + EPS)


@triton.jit
def decay(total, C: tl.constexpr):
    """``[C] -> [C, C]``: exp(G_i - G_j) on and below the diagonal, else zero."""
    i = tl.arange(0, C)
    below = i[:, None] >= i[None, :]
    return tl.where(below, tl.exp(tl.where(below, total[:, None] - total[None, :], 0.0)), 0.0)


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    """Product of matrices with elements up to one, where float16 is as precise as tf32."""
    if EXACT:
        return tl.dot(a, b, input_precision="tf32x3")
    return tl.dot(a.to(tl.float16), b.to(tl.float16))


@triton.jit
def _inverse(system, C: tl.constexpr, EXACT: tl.constexpr):
    """Inverse of ``I + system``; `system` is zero on and above the diagonal."""
    i = tl.arange(0, C)
    apart = i[:, None] ^ i[None, :]
    made = tl.where(apart == 0, 1.0, tl.where(apart == 1, -system, 0.0))
    for level in range(1, 6):
        beside = tl.where((apart >> level) == 1, system, 0.0)
        made -= _product(made, _product(beside, made, EXACT), EXACT)
    return made


@triton.jit(do_not_specialize=SAME)
def _prepare(
    Q, K, G, BETA, CHUNKS, A, P, FACTOR,
    q_stride, k_stride, g_stride, beta_stride, tokens, v_heads, scale,
    GROUP: tl.constexpr, DK: tl.constexpr, C: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """Prepare one chunk of one value head."""
    v_head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = v_head // GROUP
    i = tl.arange(0, C)
    first, end = tl.load(CHUNKS + 2 * chunk).to(tl.int64), tl.load(CHUNKS + 2 * chunk + 1)
    count = (end - first).to(tl.int32)
    valid = i < count
    g = tl.load(G + (first + i) * g_stride + v_head, mask=valid, other=0.0).to(tl.float32)
    beta = tl.load(BETA + (first + i) * beta_stride + v_head, mask=valid, other=0.0)
    beta = tl.maximum(beta.to(tl.float32), WEAKEST)
    k = tile_of(K + first * k_stride + head * DK, count, k_stride, C, DK, True)
    q = tile_of(Q + first * q_stride + head * DK, count, q_stride, C, DK, True)
    k_norm, q_norm = inverse_norm(k, EPS), inverse_norm(q, EPS) * scale
    total = tl.cumsum(g, 0)
    # Summed from the end: a difference of totals would lose precision for late tokens.
    grow, left = tl.exp(total), tl.exp(tl.cumsum(g, 0, reverse=True) - g)
    heads = tokens.to(tl.int64) * v_heads
    at = FACTOR + v_head * tokens + first + i
    tl.store(at + TOTAL * heads, total, mask=valid)
    tl.store(at + READ * heads, grow * k_norm, mask=valid)
    kept = left * k_norm * beta
    tl.store(at + KEPT * heads, kept, mask=valid)
    tl.store(at + QUERY * heads, grow * q_norm, mask=valid)
    tl.store(at + STRENGTH * heads, beta, mask=valid)
    tl.store(at + KEY * heads, k_norm, mask=valid)
    tl.store(at + ASKED * heads, q_norm, mask=valid)
    lower = decay(total, C) * (k_norm * beta)[None, :]
    kt = tl.trans(k)
    tile = (v_head * tokens + first) * C + i[:, None] * C + i[None, :]
    scores = tl.dot(q, kt, input_precision=PRECISION) * lower * q_norm[:, None]
    if FORWARD:
        if not EXACT:
            scores = scores.to(tl.float16)
    else:
        tl.store(P + tile, scores.to(P.dtype.element_ty), mask=valid[:, None])
    system = tl.dot(k, kt, input_precision=PRECISION) * lower * k_norm[:, None]
    inverse = _inverse(tl.where(i[:, None] > i[None, :], system, 0.0), C, EXACT)
    if FORWARD:
        scores = _product(scores, inverse, EXACT)
        tl.store(P + tile, scores.to(P.dtype.element_ty), mask=valid[:, None])
        inverse *= kept[:, None]
    tl.store(A + tile, inverse.to(A.dtype.element_ty), mask=valid[:, None])
