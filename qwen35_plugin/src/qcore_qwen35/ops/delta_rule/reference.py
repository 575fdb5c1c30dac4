"""Reference of the gated delta rule: one token at a time, the definition for all other forms.

This file decides the rule itself. Per document and value head, with S ``[dk, dv]`` starting at
zero or at an initial state (Yang et al. 2024, arXiv:2412.06464)::

    S <- exp(g_t) S
    S <- S + k_t beta_t (v_t - k_t^T S)
    o_t = q_t^T S                          read after the update

where k is scaled to length one and q to length ``dk ** -0.5``. Everything is computed in
float32 (float64 for float64 inputs), whatever the dtype of the inputs; o is rounded to the
dtype of v once. Decoding uses this form; prefill and training use `chunked`.

Shapes: T tokens of N documents, Hk key heads, Hv value heads (a multiple of Hk; value head h
reads key head ``h // (Hv / Hk)``), key size dk, value size dv.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

EPS = 1e-6


def inverse_norm(x: Tensor) -> Tensor:
    """The factor that normalizes to length one: ``[..., d] -> [..., 1]``; eps is in the root."""
    return (x * x).sum(-1, keepdim=True).add(EPS).rsqrt()


def query_scale(dk: int) -> float:
    """The length of a normalized query; keys have length one."""
    return float(dk**-0.5)


def computing(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computation for an input of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Sequence[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the rule to every document of a pack.

    Args:
        q: ``[T, Hk, dk]``, not yet normalized.
        k: ``[T, Hk, dk]``, not yet normalized.
        v: ``[T, Hv, dv]``.
        g: ``[T, Hv]`` log decay, at most 0.
        beta: ``[T, Hv]`` write strength.
        cu_seqlens: ``N + 1`` cumulative lengths.
        initial_state: ``[N, Hv, dk, dv]``, or zeros.

    Returns:
        o ``[T, Hv, dv]`` in the dtype of v, and the state after each document
        ``[N, Hv, dk, dv]`` in float32.
    """
    dtype = computing(v.dtype)
    repeat = v.shape[1] // k.shape[1]
    out = v.dtype
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    q = (q * inverse_norm(q) * query_scale(q.shape[-1])).repeat_interleave(repeat, dim=1)
    k = (k * inverse_norm(k)).repeat_interleave(repeat, dim=1)
    outputs, finals = [], []
    for document, (start, end) in enumerate(pairwise(cu_seqlens)):
        if initial_state is None:
            state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2])
        else:
            state = initial_state[document].to(dtype)
        for t in range(start, end):
            state = state * g[t].exp()[:, None, None]
            seen = (k[t].unsqueeze(1) @ state).squeeze(1)
            write = beta[t].unsqueeze(-1) * (v[t] - seen)
            state = state + k[t].unsqueeze(-1) * write.unsqueeze(1)
            outputs.append((q[t].unsqueeze(1) @ state).squeeze(1))
        finals.append(state)
    o = torch.stack(outputs) if outputs else torch.zeros_like(v)
    return o.to(out), torch.stack(finals)
