"""Causal attention of a pack in one launch, by the fused kernels that torch ships for CUDA.

This file decides which kernel is used. Documents of one length are a batch; the batch goes to cuDNN
if the length is a multiple of 64, as rows of a fixed length are (on an H100 with heads of 256 cuDNN
is about twice as fast as torch's FlashAttention, forward and backward). cuDNN builds a plan for
every new shape, which takes 0.15 s, so rows of arbitrary lengths would need one in each step. All
other packs go to FlashAttention. Neither backward is deterministic: both add into the gradient of q
in any order.

Shapes: T tokens, Hq query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...api.records import Verdict
from ..kernels.compare import compare, worst_verdict
from .meta import planned_attention
from .varlen import varlen_attention

_BATCH = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
_WHOLE = 64  # tokens; one in 64 random lengths is a multiple
_LARGEST_HEAD = 256  # of both kernels


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int], scale: float
) -> Tensor:
    """`attention.varlen_attention` in 16 bit on a CUDA device; same arguments and result.

    Raises:
        RuntimeError: of torch, where no fused kernel takes the shapes.
    """
    lengths = {end - start for start, end in pairwise(cu_seqlens)}
    if q.is_meta:
        return planned_attention(q, k, v, cu_seqlens, scale)
    if q.dtype == torch.float32:  # a run in float32 asks for float32
        return varlen_attention(q, k, v, cu_seqlens, scale)
    if len(lengths) > 1 or max(lengths) % _WHOLE:
        return _by_lengths(q, k, v, tuple(cu_seqlens), scale, max(lengths))
    batch = (len(cu_seqlens) - 1, lengths.pop())
    q4, k4, v4 = (x.view(*batch, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(_BATCH, set_priority=True):
        o = F.scaled_dot_product_attention(
            q4, k4, v4, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return o.transpose(1, 2).flatten(0, 1)


def _by_lengths(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: tuple[int, ...], scale: float, longest: int
) -> Tensor:
    ends = _ends(cu_seqlens, q.device)
    # torch's public form takes grouped heads from 2.12 on; the op beneath it always did.
    o: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, 0.0, True, False, scale=scale
    )[0]
    return o


@functools.lru_cache(maxsize=8)
def _ends(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """Cumulative lengths on the device, made once for all layers of a batch."""
    return torch.tensor(cu_seqlens, dtype=torch.int32).to(device, non_blocking=True)


def refuse(device: torch.device) -> str | None:
    """Why it cannot run there."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    return None


def verify(device: torch.device) -> Verdict:
    """A batch and a pack of mixed lengths against float32, with grouped heads of 256."""
    verdicts = []
    for ends in ((0, 192, 384), (0, 1, 70, 333)):
        draw = torch.Generator().manual_seed(ends[-1])
        q, k, v = (
            torch.randn(ends[-1], heads, _LARGEST_HEAD, generator=draw).to(device, torch.bfloat16)
            for heads in (4, 2, 2)
        )
        inputs = (q, k, v, ends, _LARGEST_HEAD**-0.5)
        verdicts.append(
            compare(fused_attention, varlen_attention, inputs, output=6e-3, gradient=1.2e-2)
        )
    return worst_verdict(*verdicts)
