"""Gated full attention: per-head norms of q and k, partial rope, an output gate.

This file decides what surrounds attention in this family; attention itself, and its borders
between documents, are core's (`qcore.nn.attention`). The output gate lies in q_proj: its rows
are, per head, the query and then the gate.

Shapes: T tokens, Hq query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qcore.nn.attention import cached_attention, varlen_attention
from qcore.nn.protocols import BuildContext, Packed

from .norm import RmsNorm
from .rope import Rope, rotate


@dataclass(slots=True)
class KvCache:
    """Keys and values ``[tokens, Hkv, D]`` of one document; the first `length` are written."""

    k: Tensor
    v: Tensor
    length: int = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[S, Hkv, D]`` and return all that is written.

        Raises:
            ValueError: when the document outgrows the cache.
        """
        end = self.length + len(k)
        if end > len(self.k):
            raise ValueError(f"a cache of {len(self.k)} tokens cannot hold {end}")
        self.k[self.length : end] = k
        self.v[self.length : end] = v
        self.length = end
        return self.k[:end], self.v[:end]


class Attention(nn.Module):
    """``[T, H] -> [T, H]``, causal within each document."""

    def __init__(self, ctx: BuildContext, text: Mapping[str, Any], name: str) -> None:
        super().__init__()
        self.heads: int = text["num_attention_heads"]
        self.kv_heads: int = text["num_key_value_heads"]
        self.head_dim: int = text["head_dim"]
        self.rope = Rope.of(text)
        self.dtype = ctx.dtype
        self.q_proj = ctx.linear(f"{name}.q_proj")
        self.k_proj = ctx.linear(f"{name}.k_proj")
        self.v_proj = ctx.linear(f"{name}.v_proj")
        self.o_proj = ctx.linear(f"{name}.o_proj")
        eps = text["rms_norm_eps"]
        self.q_norm = RmsNorm(ctx.tensor(f"{name}.q_norm.weight"), eps)
        self.k_norm = RmsNorm(ctx.tensor(f"{name}.k_norm.weight"), eps)

    def forward(self, x: Tensor, batch: Packed, cache: KvCache | None = None) -> Tensor:
        d = self.head_dim
        q, gate = self.q_proj(x).view(-1, self.heads, 2 * d).split(d, -1)
        k = self.k_proj(x).view(-1, self.kv_heads, d)
        v = self.v_proj(x).view(-1, self.kv_heads, d)
        cos, sin = self.rope.tables(batch, x.dtype)
        q = rotate(head_norm(self.q_norm, q), cos, sin)
        k = rotate(head_norm(self.k_norm, k), cos, sin)
        scale = d**-0.5
        if cache is None:
            o = varlen_attention(q, k, v, batch.cu_seqlens, scale)
        else:
            o = cached_attention(q, *cache.extend(k, v), scale)
        out: Tensor = self.o_proj(output_gate(o, gate).flatten(1))
        return out

    def new_cache(self, tokens: int, device: torch.device) -> KvCache:
        """Room for `tokens` tokens."""
        shape = (tokens, self.kv_heads, self.head_dim)
        k, v = (torch.empty(shape, dtype=self.dtype, device=device) for _ in range(2))
        return KvCache(k, v)


def head_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise each head of queries or keys, before rope."""
    out: Tensor = norm(x)
    return out


def output_gate(o: Tensor, gate: Tensor) -> Tensor:
    """``o * sigmoid(gate)`` in the run's dtype; saves both inputs, not the sigmoid."""
    out: Tensor = _OutputGate.apply(o, gate)  # type: ignore[no-untyped-call]
    return out


class _OutputGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(o, gate)
        return torch.sigmoid(gate).mul_(o)

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        o, gate = ctx.saved_tensors
        open_ = torch.sigmoid(gate)
        return dy * open_, torch.ops.aten.sigmoid_backward(dy * o, open_)
