"""Vision attention: every patch attends to all patches of its own frame, without a mask.

This file decides how frames are separated: frames of equal length form one batch, wherever they
lie in the input. Many small images therefore need few kernel calls, and memory is linear in U. On a
GPU only torch's FlashAttention and memory-efficient kernels are allowed: the unfused form would
materialize U x U scores, and cuDNN builds a plan for every new shape, of which images have many. On
the meta device torch would select the unfused form, so the memory and FLOPs of the fused kernels
are recorded here for the planner.

Shapes: U patches of all media, h heads, D head size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from qcore.api import BuildContext, Media
from qcore.ops import cdiv, record_work

from .linear import linear, residual
from .rope import Grids, Rope, rotate

_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
#: Throughput relative to a layer's matrix products, as for core's attention.
_FORWARD, _BACKWARD = 0.88, 0.5


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of a batch of media, grouped by length.

    Attributes:
        groups: (number of frames, patches per frame) of each group, in attention order.
        order: ``[U]`` int64, input index of each patch in attention order; ``None`` if the input
            already has this order.
        inverse: inverse permutation of `order`.
    """

    groups: tuple[tuple[int, int], ...]
    order: Tensor | None = None
    inverse: Tensor | None = None

    @staticmethod
    def of(grids: Grids, device: torch.device) -> Frames:
        """Group the frames of `grids`; each temporal patch is a frame."""
        lengths = [height * width for time, height, width in grids for _ in range(time)]
        counts = Counter(lengths)
        groups = tuple((count, length) for length, count in counts.items())
        if sum(1 for _ in groupby(lengths)) == len(groups):
            return Frames(groups)
        cpu = torch.device("cpu")
        patches = torch.arange(sum(lengths), device=cpu).split(lengths)
        order = torch.cat([frame for length in counts for frame in patches if len(frame) == length])
        return Frames(groups, order.to(device), order.argsort().to(device))


def frame_attention(q: Tensor, k: Tensor, v: Tensor, frames: Frames, scale: float) -> Tensor:
    """Attention of every patch to all patches of its frame.

    Args:
        q: ``[U, h, D]``.
        k: ``[U, h, D]``.
        v: ``[U, h, D]``.
        frames: grouping of patches into frames.
        scale: factor applied to the scores.

    Returns:
        ``[U, h, D]``.

    Raises:
        RuntimeError: torch has no fused GPU kernel for these shapes.
    """
    order, inverse = frames.order, frames.inverse
    if order is not None:
        q, k, v = (x.index_select(0, order) for x in (q, k, v))
    outputs, start = [], 0
    for count, length in frames.groups:
        end, shape = start + count * length, (count, length)
        q4, k4, v4 = (x[start:end].unflatten(0, shape) for x in (q, k, v))
        outputs.append(_attend(q4, k4, v4, scale))
        start = end
    o = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return o if inverse is None else o.index_select(0, inverse)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention within frames: each ``[frames, length, h, D] -> [frames * length, h, D]``."""
    if q.is_meta:
        out: Tensor = _MetaAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
        return out.flatten(0, 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(_FUSED) if q.is_cuda else nullcontext():
        o = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return o.transpose(1, 2).flatten(0, 1)


class _MetaAttention(torch.autograd.Function):
    """Allocations, saved tensors and FLOPs of the fused kernels; computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames, length, heads, size = q.shape
        o, lse = q.new_empty(q.shape), q.new_empty(frames, heads, length, dtype=torch.float32)
        ctx.flops = 4.0 * frames * length**2 * heads * size
        record_work("frame_attention", q, k, v, o, lse, flops=ctx.flops / _FORWARD)
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
        # The gradient of q is accumulated in float32, with head sizes padded to a multiple of 32.
        sums = q.new_empty(*q.shape[:-1], 32 * cdiv(q.shape[-1], 32), dtype=torch.float32)
        rows = torch.empty_like(lse)
        work = 2.5 * ctx.flops / _BACKWARD
        record_work("frame_attention_backward", q, k, v, o, do, dq, dk, dv, sums, flops=work)
        del sums, rows
        return dq, dk, dv


class Attention(nn.Module):
    """Self-attention within each frame, added to the residual stream: ``[U, h * D]`` in and out."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, stream: Tensor, x: Tensor, media: Media) -> Tensor: ...

    def __init__(self, ctx: BuildContext, vision: Mapping[str, Any], name: str) -> None:
        super().__init__()
        self.heads: int = vision["num_heads"]
        self.rope = Rope.of(vision)
        self.qkv = linear(ctx, f"{name}.qkv")
        self.proj = linear(ctx, f"{name}.proj")

    def forward(self, stream: Tensor, x: Tensor, media: Media) -> Tensor:
        q, k, v = self._heads(self.qkv(x), media)
        device = media.values.device
        frames = media.memo("frames", lambda: Frames.of(media.grids, device))
        o = frame_attention(q, k, v, frames, self.rope.dim**-0.5)
        return residual(stream, self.proj, o.flatten(1))

    def _heads(self, y: Tensor, media: Media) -> tuple[Tensor, Tensor, Tensor]:
        """Split into q, k, v ``[U, h, D]``; bias and rope of q and k in float32, rounded once."""
        bias, split = self.qkv.get_parameter("bias"), 2 * y.shape[1] // 3
        wide = torch.promote_types(y.dtype, torch.float32)
        both = (y[:, :split].to(wide) + bias[:split]).unflatten(1, (2, self.heads, -1))
        q, k = rotate(both, *self.rope.tables(media)).to(y.dtype).unbind(1)
        v = y[:, split:] + bias[split:].to(y.dtype)
        return q, k, v.unflatten(1, (self.heads, -1))
