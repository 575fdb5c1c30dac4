"""Reference of the delta rule's inputs: convolved q, k, v, log decays, write strengths.

For the convolution ``y_t = silu(sum_i w_i u_(t - K + 1 + i))`` this file decides that documents are
concatenated with ``K - 1`` rows of zeros before each, so that no window crosses a document start,
and convolved as one plane of height T and width 1 in token-major layout. This is
``channels_last``, for which the CPU kernel is about twenty times faster than the one-dimensional
form on channel-major memory, with bit-identical results. The convolution rounds to the dtype of u
before SiLU, as transformers does.

Only u is saved; the backward convolves again. Shapes: T tokens, Hk key heads of dk, Hv value
heads of dv, C = 2 Hk dk + Hv dv channels in the order q, k, v, kernel K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Documents:
    """Document boundaries of a pack, for the host and for kernels.

    Attributes:
        cu_seqlens: ``N + 1`` cumulative lengths.
        starts: ``[T]`` int32, index of the first token of each token's document.
    """

    cu_seqlens: tuple[int, ...]
    starts: Tensor

    @staticmethod
    def of(cu_seqlens: Sequence[int], device: torch.device) -> Documents:
        """Compute on the host and copy without waiting for the device.

        On the meta device no numbers are computed: planning for many tokens takes no memory.
        """
        if device.type == "meta":
            starts = torch.empty(cu_seqlens[-1], dtype=torch.int32, device=device)
            return Documents(tuple(cu_seqlens), starts)
        ends = torch.tensor(cu_seqlens)
        starts = torch.repeat_interleave(ends[:-1].int(), ends.diff(), output_size=cu_seqlens[-1])
        if device.type == "cuda" and torch.cuda.is_available():
            starts = starts.pin_memory()
        return Documents(tuple(cu_seqlens), starts.to(device, non_blocking=True))


class Heads(NamedTuple):
    """Division of the channels into heads: Hk, dk, Hv, dv."""

    k_heads: int
    k_dim: int
    v_heads: int
    v_dim: int

    def split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[T, C]`` -> views q, k ``[T, Hk, dk]``, v ``[T, Hv, dv]``."""
        keys = self.k_heads * self.k_dim
        q, k, v = mixed.split((keys, keys, self.v_heads * self.v_dim), -1)
        return (
            q.unflatten(-1, (self.k_heads, self.k_dim)),
            k.unflatten(-1, (self.k_heads, self.k_dim)),
            v.unflatten(-1, (self.v_heads, self.v_dim)),
        )


class DeltaInputs(NamedTuple):
    """q, k ``[T, Hk, dk]``, v ``[T, Hv, dv]``, g ``[T, Hv]`` float32, beta ``[T, Hv]``, and z.

    z is passed through so that its gradient shares one buffer with the others.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    z: Tensor


def delta_inputs(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    documents: Documents,
    heads: Heads,
) -> DeltaInputs:
    """Compute the inputs of the delta rule from the projections' outputs.

    Args:
        qkv: ``[T, C]`` before the convolution.
        z: ``[T, Hv * dv]``, the gate of the norm after the rule.
        a: ``[T, Hv]``, input of the decay.
        b: ``[T, Hv]``, input of the write strength.
        conv_weight: ``[C, 1, K]``.
        a_log: ``[Hv]``.
        dt_bias: ``[Hv]``.
        documents: document boundaries of the pack.
        heads: division of the channels into heads.
    """
    mixed = causal_conv_silu(qkv, conv_weight, documents.cu_seqlens)
    g, beta = log_decay(a, a_log, dt_bias), torch.sigmoid(b)
    return DeltaInputs(*heads.split(mixed), g, beta, z)


def log_decay(a: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """``[T, Hv]``, at most 0, in float32: ``-exp(A_log) * softplus(a + dt_bias)``."""
    return -a_log.float().exp() * F.softplus(a.float() + dt_bias)


def causal_conv_silu(
    u: Tensor, weight: Tensor, cu_seqlens: Sequence[int], history: Tensor | None = None
) -> Tensor:
    """Convolve each document on its own, then SiLU.

    Args:
        u: ``[T, C]``.
        weight: ``[C, 1, K]``; its last tap multiplies the current token.
        cu_seqlens: ``N + 1`` cumulative lengths.
        history: ``[K, C]`` the inputs before the only document of a continued pack; has no
            gradient.

    Returns:
        ``[T, C]``.
    """
    if history is not None:
        joined = torch.cat([history.to(u.dtype), u])
        return F.silu(_convolve(joined, weight.to(u.dtype)))[1:]
    out: Tensor = _ConvSilu.apply(u, weight, tuple(cu_seqlens))  # type: ignore[no-untyped-call]
    return out


def _convolve(padded: Tensor, weight: Tensor) -> Tensor:
    """``[L, C] -> [L - K + 1, C]``: row r is the window of rows r to r + K - 1."""
    plane = padded.unsqueeze(0).unsqueeze(2).permute(0, 3, 1, 2)
    out = F.conv2d(plane, weight.unsqueeze(-1), groups=padded.shape[1])
    return out.permute(0, 2, 3, 1).reshape(-1, padded.shape[1])


def _spread(x: Tensor, cu_seqlens: tuple[int, ...], gap: int, *, before: bool) -> Tensor:
    """Documents with `gap` rows of zeros before (or after) each."""
    zeros = x.new_zeros(gap, x.shape[1])
    pieces: list[Tensor] = []
    for start, end in pairwise(cu_seqlens):
        pieces += [zeros, x[start:end]] if before else [x[start:end], zeros]
    return torch.cat(pieces)


def _gather(x: Tensor, cu_seqlens: tuple[int, ...], gap: int) -> Tensor:
    """The documents again, from what `_convolve` made of what `_spread` made."""
    if len(cu_seqlens) == 2:
        return x
    spans = enumerate(pairwise(cu_seqlens))
    return torch.cat([x[start + gap * n : end + gap * n] for n, (start, end) in spans])


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(u, weight)
        ctx.cu_seqlens = cu_seqlens
        return F.silu(_before_silu(u, weight, cu_seqlens))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, weight = ctx.saved_tensors
        cu_seqlens, gap = ctx.cu_seqlens, weight.shape[-1] - 1
        pre = _before_silu(u, weight, cu_seqlens)
        dpre = torch.ops.aten.silu_backward(dy, pre)
        du = dweight = None
        if ctx.needs_input_grad[0]:
            after = _spread(dpre, cu_seqlens, gap, before=False)
            du = _gather(_convolve(after, weight.flip(-1).to(u.dtype)), cu_seqlens, gap)
        if ctx.needs_input_grad[1]:
            dweight = _weight_grad(u, dpre, cu_seqlens, weight)
        return du, dweight, None


def _before_silu(u: Tensor, weight: Tensor, cu_seqlens: tuple[int, ...]) -> Tensor:
    gap = weight.shape[-1] - 1
    padded = _spread(u, cu_seqlens, gap, before=True)
    return _gather(_convolve(padded, weight.to(u.dtype)), cu_seqlens, gap)


def _weight_grad(u: Tensor, dpre: Tensor, cu_seqlens: tuple[int, ...], weight: Tensor) -> Tensor:
    taps = weight.shape[-1]
    wide = torch.promote_types(u.dtype, torch.float32)
    # Rows of u ahead of a start are zeros in the spread layout, so no window needs a mask.
    inputs = _spread(u, cu_seqlens, taps - 1, before=True).to(wide)
    grads = _spread(dpre, cu_seqlens, taps - 1, before=True).to(wide)[taps - 1 :]
    rows = len(grads)
    sums = [(inputs[tap : tap + rows] * grads).sum(0) for tap in range(taps)]
    return torch.stack(sums, -1).unsqueeze(1).to(weight.dtype)
