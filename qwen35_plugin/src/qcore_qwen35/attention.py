"""Gated full attention of Qwen 3.5: q and k norms, partial rope, attention, output gate.

This file decides what surrounds attention in this family (computed by `ops.attention`); attention
itself and the boundaries between documents are core's (`qcore.ops`).

Shapes: T tokens, Hq query heads, Hkv key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from qcore.api import BuildContext, DecodeCache, Packed
from qcore.ops import (
    cached_attention,
    recomputable,
    recompute,
    span_bias,
    step_attention,
    varlen_attention,
)

from .norm import Weight
from .ops.attention.reference import AttentionInputs, attention_inputs, output_gate
from .rope import Rope


@dataclass(slots=True)
class KvCache:
    """Preallocated keys and values ``[tokens, Hkv, D]`` of one document.

    `extend` appends tokens. After `hold`, `put` writes one token at a time; it depends on no number
    on the host, so that a captured CUDA graph can be replayed.

    Attributes:
        k: keys; zero where nothing was written.
        v: values, likewise.
        length: number of tokens written before `hold`.
        at: ``[1]`` int64 on the device, the position of the next token after `hold`; the caller
            advances it.
        span: number of leading tokens that attention reads after `hold`.
    """

    k: Tensor
    v: Tensor
    length: int = 0
    at: Tensor | None = None
    span: int = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``[S, Hkv, D]`` and return all keys and values written so far.

        Raises:
            ValueError: the document does not fit in the cache.
        """
        end = self.length + len(k)
        if end > len(self.k):
            raise ValueError(f"a cache of {len(self.k)} tokens cannot hold {end}")
        self.k[self.length : end] = k
        self.v[self.length : end] = v
        self.length = end
        return self.k[:end], self.v[:end]

    def put(self, k: Tensor, v: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token ``[1, Hkv, D]`` at position `at` and return the first `span` tokens."""
        self.k.index_copy_(0, at, k)
        self.v.index_copy_(0, at, v)
        return self.k[: self.span], self.v[: self.span]

    def hold(self, at: Tensor, span: int) -> None:
        """Switch to one token per call, written at `at`, reading `span` tokens."""
        self.at, self.span = at, span

    def reset(self) -> None:
        """Start a new document."""
        self.k.zero_()  # a non-finite value would spoil the results even where it is masked out
        self.v.zero_()
        self.length, self.at, self.span = 0, None, 0


_F = TypeVar("_F", bound=Callable[..., Any])
Backed = tuple[str, _F]  #: an op and its reference in torch
INPUTS: Backed[Callable[..., AttentionInputs]] = ("qwen35::attention_inputs", attention_inputs)
OUTPUT_GATE: Backed[Callable[[Tensor, Tensor], Tensor]] = ("qwen35::output_gate", output_gate)


class Attention(nn.Module):
    """``[T, H] -> [T, H]``, causal within each document.

    Args:
        ctx: creates the linear layers and kernels.
        text: the text section of config.json.
        name: module name relative to the trunk.
        inputs: norms and rope: from the outputs of q_proj, k_proj and v_proj to q, k, v and gate.
        gate: ``(output [T, Hq, D], gate) -> [T, Hq, D]``.
    """

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(
            self, x: Tensor, batch: Packed, cache: DecodeCache | None = None
        ) -> Tensor: ...

    def __init__(
        self,
        ctx: BuildContext,
        text: Mapping[str, Any],
        name: str,
        *,
        inputs: Backed[Callable[..., AttentionInputs]] = INPUTS,
        gate: Backed[Callable[[Tensor, Tensor], Tensor]] = OUTPUT_GATE,
    ) -> None:
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
        self.q_norm = Weight(ctx.tensor(f"{name}.q_norm.weight"))
        self.k_norm = Weight(ctx.tensor(f"{name}.k_norm.weight"))
        self.eps: float = text["rms_norm_eps"]
        self._project = ctx.stack(self.q_proj, self.k_proj, self.v_proj)
        self._inputs = ctx.kernel(*inputs)
        self._attend = ctx.kernel("attention", varlen_attention)
        self._gate = ctx.kernel(*gate)

    def forward(self, x: Tensor, batch: Packed, cache: DecodeCache | None = None) -> Tensor:
        q, k, v, gate = self._projected(x, batch)
        scale = self.head_dim**-0.5
        if cache is None:
            o = self._attend(q, k, v, batch.cu_seqlens, scale)
        else:
            assert isinstance(cache, KvCache)
            o = self._decoded(q, k, v, batch, cache, scale)
        return self.o_proj(recompute(self._gate, o, gate).flatten(1))

    def _decoded(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Packed, cache: KvCache, scale: float
    ) -> Tensor:
        if cache.at is None:
            return cached_attention(q, *cache.extend(k, v), scale)
        at, span = cache.at, cache.span
        bias = batch.memo(f"span bias {span}", lambda: span_bias(at, span))
        return step_attention(q, *cache.put(k, v, at), bias, scale)

    def _projected(self, x: Tensor, batch: Packed) -> AttentionInputs:
        norms = (self.q_norm.weight, self.k_norm.weight, self.eps)
        args: tuple[Any, ...] = (*self._project(x), *norms, *self.rope.tables(batch, x.dtype))
        inputs = self._inputs(*args)
        recomputable(inputs[:2], lambda *args: self._inputs(*args)[:2], *args)
        return inputs

    def new_cache(self, tokens: int, device: torch.device) -> KvCache:
        """An empty cache for `tokens` tokens."""
        shape = (tokens, self.kv_heads, self.head_dim)
        k, v = (torch.zeros(shape, dtype=self.dtype, device=device) for _ in range(2))
        return KvCache(k, v)
