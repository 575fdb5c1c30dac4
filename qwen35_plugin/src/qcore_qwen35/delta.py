"""The gated delta net: projections, causal convolution, delta rule, gated norm.

This file decides what surrounds the delta rule and how a document's state is carried while
decoding. The rule is `ops.delta_rule`, the convolution `ops.conv`: both start anew at every
document of a pack.

Shapes: T tokens, Hk key heads of dk, Hv value heads of dv, C = 2 Hk dk + Hv dv channels in
the order q, k, v, K taps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.nn.protocols import BuildContext, Packed

from .norm import GatedNorm
from .ops.conv import causal_conv_silu
from .ops.delta_rule import CHUNK, Chunks, chunked_delta_rule, recurrent_delta_rule


@dataclass(slots=True)
class DeltaCache:
    """What one document leaves behind in one layer.

    Attributes:
        conv: ``[K, C]`` the last inputs of the convolution, zeros before the start.
        state: ``[1, Hv, dk, dv]`` float32 whatever the run's dtype.
    """

    conv: Tensor
    state: Tensor


class Weight(nn.Module):
    """A tensor under a name of its own (``conv1d.weight``), used by its owner."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class GatedDeltaNet(nn.Module):
    """``[T, H] -> [T, H]``, a recurrence within each document."""

    def __init__(self, ctx: BuildContext, text: Mapping[str, Any], name: str) -> None:
        super().__init__()
        self.k_heads: int = text["linear_num_key_heads"]
        self.v_heads: int = text["linear_num_value_heads"]
        self.k_dim: int = text["linear_key_head_dim"]
        self.v_dim: int = text["linear_value_head_dim"]
        self.kernel: int = text["linear_conv_kernel_dim"]
        self.dtype = ctx.dtype
        self.in_proj_qkv = ctx.linear(f"{name}.in_proj_qkv")
        self.in_proj_z = ctx.linear(f"{name}.in_proj_z")
        self.in_proj_a = ctx.linear(f"{name}.in_proj_a")
        self.in_proj_b = ctx.linear(f"{name}.in_proj_b")
        self.conv1d = Weight(ctx.tensor(f"{name}.conv1d.weight"))
        self.A_log = ctx.tensor(f"{name}.A_log")
        self.dt_bias = ctx.tensor(f"{name}.dt_bias")
        self.norm = GatedNorm(ctx.tensor(f"{name}.norm.weight"), text["rms_norm_eps"])
        self.out_proj = ctx.linear(f"{name}.out_proj")

    def forward(self, x: Tensor, batch: Packed, cache: DeltaCache | None = None) -> Tensor:
        qkv = self._convolve(self.in_proj_qkv(x), batch, cache)
        z = self.in_proj_z(x).view(-1, self.v_heads, self.v_dim)
        keys = self.k_heads * self.k_dim
        q, k, v = qkv.split((keys, keys, self.v_heads * self.v_dim), -1)
        q, k = q.unflatten(-1, (-1, self.k_dim)), k.unflatten(-1, (-1, self.k_dim))
        v = v.unflatten(-1, (-1, self.v_dim))
        beta = torch.sigmoid(self.in_proj_b(x))
        g = log_decay(self.in_proj_a(x), self.A_log, self.dt_bias)
        o = self._scan(q, k, v, g, beta, batch, cache)
        out: Tensor = self.out_proj(self.norm(o, z).flatten(1))
        return out

    def new_cache(self, tokens: int, device: torch.device) -> DeltaCache:
        """An empty state; its size does not depend on `tokens`."""
        channels = 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim
        conv = torch.zeros(self.kernel, channels, dtype=self.dtype, device=device)
        state = torch.zeros(1, self.v_heads, self.k_dim, self.v_dim, device=device)
        return DeltaCache(conv, state)

    def _convolve(self, u: Tensor, batch: Packed, cache: DeltaCache | None) -> Tensor:
        weight = self.conv1d.weight
        if cache is None:
            return causal_conv_silu(u, weight, batch.cu_seqlens)
        out = causal_conv_silu(u, weight, batch.cu_seqlens, cache.conv)
        cache.conv = torch.cat([cache.conv, u.detach().to(cache.conv.dtype)])[-self.kernel :]
        return out

    def _scan(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        batch: Packed,
        cache: DeltaCache | None,
    ) -> Tensor:
        lengths = batch.cu_seqlens
        if cache is None:
            layout = batch.memo("delta chunks", lambda: Chunks.of(lengths, CHUNK, q.device))
            return chunked_delta_rule(q, k, v, g, beta, lengths, layout=layout)[0]
        rule = recurrent_delta_rule if len(q) == 1 else chunked_delta_rule
        o, state = rule(q, k, v, g, beta, lengths, cache.state)
        cache.state = state.detach()
        return o


def log_decay(a: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """``[T, Hv]``, at most 0, in float32: ``-exp(A_log) * softplus(a + dt_bias)``."""
    return -a_log.float().exp() * F.softplus(a.float() + dt_bias)
