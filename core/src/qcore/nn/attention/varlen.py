"""Causal attention within each document of a pack, and over a cache while decoding.

This file decides how documents are kept apart: each is attended on its own, neighbours of
equal length in one call, so no mask exists and memory is linear in T (torch's flash kernels,
on CPU too). Norms, rope and gates around attention are the plugin's.

Shapes: T tokens, Hq query heads, Hkv key heads (Hq a multiple of Hkv; query head h reads key
head ``h // (Hq / Hkv)``), D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int], scale: float
) -> Tensor:
    """Causal attention, block-diagonal over documents.

    Args:
        q: ``[T, Hq, D]``.
        k: ``[T, Hkv, D]``.
        v: ``[T, Hkv, D]``.
        cu_seqlens: ``N + 1`` cumulative lengths.
        scale: factor of the scores.

    Returns:
        ``[T, Hq, D]``.
    """
    outputs = []
    for start, count, length in _runs(cu_seqlens):
        end = start + count * length
        rows, shape = slice(start, end), (count, length)
        batch_q, batch_k, batch_v = (
            x[rows].view(*shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
        )
        o = _attend(batch_q, batch_k, batch_v, scale, causal=True)
        outputs.append(o.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of the last S tokens of one document over all L of it.

    Args:
        q: ``[S, Hq, D]``, the last S positions.
        k: ``[L, Hkv, D]``.
        v: ``[L, Hkv, D]``.
        scale: factor of the scores.

    Returns:
        ``[S, Hq, D]``.
    """
    new, total = len(q), len(k)
    mask = None
    if 1 < new < total:
        ones = torch.ones(new, total, dtype=torch.bool, device=q.device)
        mask = ones.tril(total - new)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    o = _attend(q, k, v, scale, causal=1 < new == total, mask=mask)
    return o.squeeze(0).transpose(0, 1)


def span_bias(at: Tensor, span: int) -> Tensor:
    """The mask of a cache as a bias of scores: 0 up to and including position `at`, then -inf.

    Args:
        at: ``[1]`` int64 on the device.
        span: L, the tokens of the cache that are read.

    Returns:
        ``[L]`` float32.
    """
    number = torch.arange(span, device=at.device)
    return torch.zeros(span, device=at.device).masked_fill_(number > at, -torch.inf)


def step_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention of one token over a cache, of which only the device knows how much is filled.

    Scores are float32; weights are rounded to the dtype of v, as in fused kernels.

    Args:
        q: ``[1, Hq, D]``.
        k: ``[L, Hkv, D]``; finite also where nothing was written.
        v: ``[L, Hkv, D]``; likewise.
        bias: ``[L]``, from `span_bias`.
        scale: factor of the scores.

    Returns:
        ``[1, Hq, D]``.
    """
    groups = q.reshape(k.shape[1], -1, q.shape[2])  # queries of one key head are its rows
    keys, values = k.permute(1, 2, 0), v.transpose(0, 1)
    if q.is_cuda and q.dtype.itemsize == 2:
        scores = torch.bmm(groups, keys, out_dtype=torch.float32)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.bmm(groups.to(wide), keys.to(wide))
    weights = F.softmax(torch.add(bias, scores, alpha=scale), -1).to(v.dtype)
    return torch.bmm(weights, values).view(q.shape)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, mask: Tensor | None = None
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )


def _runs(cu_seqlens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, documents, length) of each run of neighbours of equal length."""
    start = 0
    for length, run in groupby(end - begin for begin, end in pairwise(cu_seqlens)):
        count = len(list(run))
        if length:
            yield start, count, length
        start += count * length
