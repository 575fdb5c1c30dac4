"""Linear attention of Qwen 3.5 (Gated DeltaNet): projections, convolution, delta rule, norm.

This file decides what surrounds the delta rule and how the state of a document is carried during
decoding. `ops.delta_rule` computes the rule, `ops.delta_inputs` its inputs. Rule and convolution
restart at every document of a pack.

Shapes: T tokens, Hk key heads of dk, Hv value heads of dv, C = 2 Hk dk + Hv dv channels in
the order q, k, v, K taps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qcore.api import BuildContext, DecodeCache, Packed
from qcore.ops import recomputable

from .norm import GatedNorm, Weight
from .ops.delta_inputs.reference import (
    DeltaInputs,
    Documents,
    Heads,
    causal_conv_silu,
    delta_inputs,
    log_decay,
)
from .ops.delta_rule import CHUNK, Chunks, chunked_delta_rule
from .ops.delta_step.reference import delta_step


@dataclass(slots=True)
class DeltaCache:
    """The recurrent state of one document in one layer; both tensors are updated in place.

    Attributes:
        conv: ``[K, C]`` last inputs of the convolution, zeros before the start.
        state: ``[1, Hv, dk, dv]``, float32 for every dtype of the run.
    """

    conv: Tensor
    state: Tensor

    def reset(self) -> None:
        """Start a new document."""
        self.conv.zero_()
        self.state.zero_()

    def hold(self, at: Tensor, span: int) -> None:
        """Do nothing: the state has a fixed size."""


class GatedDeltaNet(nn.Module):
    """``[T, H] -> [T, H]``, a recurrence within each document.

    Args:
        ctx: creates the linear layers and kernels.
        text: the text section of config.json.
        name: module name relative to the trunk.
        norm: ``(context, name, eps) -> module`` that creates the gated norm, called as
            ``module(o [T, Hv, dv], z [T, Hv, dv]) -> [T, Hv, dv]``.
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
        norm: Callable[[BuildContext, str, float], nn.Module] = GatedNorm,
    ) -> None:
        super().__init__()
        self.heads = Heads(
            text["linear_num_key_heads"],
            text["linear_key_head_dim"],
            text["linear_num_value_heads"],
            text["linear_value_head_dim"],
        )
        self.kernel: int = text["linear_conv_kernel_dim"]
        self.dtype = ctx.dtype
        self.in_proj_qkv = ctx.linear(f"{name}.in_proj_qkv")
        self.in_proj_z = ctx.linear(f"{name}.in_proj_z")
        self.in_proj_a = ctx.linear(f"{name}.in_proj_a")
        self.in_proj_b = ctx.linear(f"{name}.in_proj_b")
        self.conv1d = Weight(ctx.tensor(f"{name}.conv1d.weight"))
        self.A_log = ctx.tensor(f"{name}.A_log")
        self.dt_bias = ctx.tensor(f"{name}.dt_bias")
        self.norm = norm(ctx, f"{name}.norm", text["rms_norm_eps"])
        self.out_proj = ctx.linear(f"{name}.out_proj")
        self._project = ctx.stack(self.in_proj_qkv, self.in_proj_z, self.in_proj_a, self.in_proj_b)
        self._inputs = ctx.kernel("qwen35::delta_inputs", delta_inputs)
        self._rule = ctx.kernel("qwen35::delta_rule", chunked_delta_rule)
        self._step = ctx.kernel("qwen35::delta_step", delta_step)

    def forward(self, x: Tensor, batch: Packed, cache: DecodeCache | None = None) -> Tensor:
        assert cache is None or isinstance(cache, DeltaCache)
        if cache is not None and len(x) == 1:
            o, z = self._decode_step(x, cache)
        else:
            if cache is None:
                inputs = self._training_inputs(x, batch)
            else:
                inputs = self._cached_inputs(x, batch, cache)
            o, z = self._scan(inputs, batch, cache), inputs.z
        z = z.unflatten(-1, (self.heads.v_heads, self.heads.v_dim))
        return self.out_proj(self.norm(o, z).flatten(1))

    def new_cache(self, tokens: int, device: torch.device) -> DeltaCache:
        """A zero state; its size does not depend on `tokens`."""
        k_heads, k_dim, v_heads, v_dim = self.heads
        channels = 2 * k_heads * k_dim + v_heads * v_dim
        conv = torch.zeros(self.kernel, channels, dtype=self.dtype, device=device)
        state = torch.zeros(1, v_heads, k_dim, v_dim, device=device)
        return DeltaCache(conv, state)

    def _training_inputs(self, x: Tensor, batch: Packed) -> DeltaInputs:
        documents = batch.memo("documents", lambda: Documents.of(batch.cu_seqlens, x.device))
        frozen = (self.conv1d.weight, self.A_log, self.dt_bias, documents, self.heads)
        args: tuple[Any, ...] = (*self._project(x), *frozen)
        inputs = self._inputs(*args)
        recomputable(inputs[:-1], lambda *args: self._inputs(*args)[:-1], *args)
        return inputs

    def _cached_inputs(self, x: Tensor, batch: Packed, cache: DeltaCache) -> DeltaInputs:
        qkv, z, a, b = self._project(x)
        mixed = causal_conv_silu(qkv, self.conv1d.weight, batch.cu_seqlens, cache.conv)
        history = torch.cat([cache.conv, qkv.detach().to(cache.conv.dtype)])
        cache.conv.copy_(history[-self.kernel :])
        g, beta = log_decay(a, self.A_log, self.dt_bias), torch.sigmoid(b)
        return DeltaInputs(*self.heads.split(mixed), g, beta, z)

    def _scan(self, inputs: DeltaInputs, batch: Packed, cache: DeltaCache | None) -> Tensor:
        q, k, v, g, beta, _ = inputs
        lengths = batch.cu_seqlens
        if cache is None:
            layout = batch.memo("delta chunks", lambda: Chunks.of(lengths, CHUNK, q.device))
            return self._rule(q, k, v, g, beta, lengths, layout=layout)[0]
        o, state = chunked_delta_rule(q, k, v, g, beta, lengths, cache.state)
        cache.state.copy_(state.detach())
        return o

    def _decode_step(self, x: Tensor, cache: DeltaCache) -> tuple[Tensor, Tensor]:
        """One token: the output of the rule, and z."""
        qkv, z, a, b = self._project(x)
        frozen = (self.conv1d.weight, self.A_log, self.dt_bias)
        return self._step(qkv, a, b, *frozen, cache.conv, cache.state, self.heads), z
