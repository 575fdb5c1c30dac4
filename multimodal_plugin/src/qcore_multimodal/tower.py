"""The vision tower of Qwen 3.5 and 3.6: patch embedding, residual blocks, merger.

This file decides the order of blocks and their parameter names (those of the table, without its
root). `attention` computes attention, `media_batch` the pixel values of the patches. The merger is
the last layer. `guards` has already refused any config that these blocks do not support.

Shapes: U patches of all media, D the tower's hidden size, n = U / merge^2 embeddings, H the text
model's hidden size, F values per patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcore.api import BuildContext, Media
from qcore.api import Tower as TowerProtocol

from .attention import Attention
from .linear import LayerNorm, activated, affine, linear, residual
from .media_batch import PixelBatch
from .pos_embed import interpolation
from .table import vision_config

#: Patches that are embedded at a time, to bound the memory of their float values.
_PATCHES_PER_SLICE = 8192


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` with the tanh approximation, added to the residual stream."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, stream: Tensor, x: Tensor) -> Tensor: ...

    def __init__(self, ctx: BuildContext, name: str) -> None:
        super().__init__()
        self.linear_fc1 = linear(ctx, f"{name}.linear_fc1")
        self.linear_fc2 = linear(ctx, f"{name}.linear_fc2")

    def forward(self, stream: Tensor, x: Tensor) -> Tensor:
        return residual(stream, self.linear_fc2, activated(self.linear_fc1, x, "tanh"))


class Block(nn.Module):
    """``x += attn(norm1(x)); x += mlp(norm2(x))``."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, x: Tensor, media: Media) -> Tensor: ...

    def __init__(self, ctx: BuildContext, vision: Mapping[str, Any], number: int) -> None:
        super().__init__()
        name = f"blocks.{number}"
        self.norm1 = LayerNorm(ctx, f"{name}.norm1")
        self.attn = Attention(ctx, vision, f"{name}.attn")
        self.norm2 = LayerNorm(ctx, f"{name}.norm2")
        self.mlp = Mlp(ctx, f"{name}.mlp")

    def forward(self, x: Tensor, media: Media) -> Tensor:
        x = self.attn(x, self.norm1(x), media)
        return self.mlp(x, self.norm2(x))


class Merger(nn.Module):
    """``[U, D] -> [n, H]``: each patch is normalized, then a block of patches becomes one row.

    The GELU is exact, without the tanh approximation.
    """

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, x: Tensor, media: Media) -> Tensor: ...

    def __init__(self, ctx: BuildContext, merge: int) -> None:
        super().__init__()
        self.merge = merge
        self.norm = LayerNorm(ctx, "merger.norm")
        self.linear_fc1 = linear(ctx, "merger.linear_fc1")
        self.linear_fc2 = linear(ctx, "merger.linear_fc2")

    def forward(self, x: Tensor, media: Media) -> Tensor:
        rows = self.norm(x).view(-1, self.merge**2 * x.shape[1])
        return affine(self.linear_fc2, activated(self.linear_fc1, rows, "none"))


class _Projection(nn.Module):
    """``patch_embed.proj``: a convolution with stride equal to the patch size, as one matrix."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, ctx: BuildContext, name: str) -> None:
        super().__init__()
        self.weight = ctx.tensor(f"{name}.weight")
        self.bias = ctx.tensor(f"{name}.bias")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1).to(x.dtype), self.bias.to(x.dtype))


class _PatchEmbed(nn.Module):
    """``patch_embed``: ``[U, F] -> [U, D]``."""

    def __init__(self, ctx: BuildContext) -> None:
        super().__init__()
        self.proj = _Projection(ctx, "patch_embed.proj")


class _PosEmbed(nn.Module):
    """``pos_embed``: the learned square of position embeddings."""

    if TYPE_CHECKING:  # nn.Module.__call__ returns Any

        def __call__(self, index: Tensor, weights: Tensor) -> Tensor: ...

    def __init__(self, ctx: BuildContext) -> None:
        super().__init__()
        self.weight = ctx.tensor("pos_embed.weight")
        self.side = math.isqrt(len(self.weight))

    def forward(self, index: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of position embeddings in float32: each ``[U, 4] -> [U, D]``."""
        every = zip(index.unbind(1), weights.unsqueeze(2).unbind(1), strict=True)
        first, *rest = (F.embedding(near, self.weight) * weight for near, weight in every)
        for term in rest:
            first = first + term
        return first


class Tower(nn.Module):
    """The vision tower: patches in, embeddings of the text model out."""

    def __init__(self, ctx: BuildContext) -> None:
        super().__init__()
        vision = vision_config(ctx.config)
        self.dtype = ctx.dtype
        self.merge: int = vision["spatial_merge_size"]
        self.channels: int = vision["in_channels"]
        self.patch: int = self.channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2
        self.patch_embed = _PatchEmbed(ctx)
        self.pos_embed = _PosEmbed(ctx)
        blocks = [Block(ctx, vision, number) for number in range(vision["depth"])]
        self.blocks = nn.ModuleList(blocks)
        self.merger = Merger(ctx, self.merge)
        self._layers: tuple[Block | Merger, ...] = (*blocks, self.merger)

    @property
    def layers(self) -> Sequence[Block | Merger]:
        """The blocks, then the merger."""
        return self._layers

    def embed(self, media: Media) -> Tensor:
        """Patch and position embeddings: ``values [U, F] -> [U, D]``.

        Raises:
            ValueError: the grids have a different number of patches, or bytes lack a table.
        """
        values = media.values
        units = sum(math.prod(grid) for grid in media.grids)
        if values.shape != (units, self.patch):
            shape = f"values of shape {tuple(values.shape)}"
            raise ValueError(f"{shape} for {units} patches of {self.patch} numbers")
        index, weights = media.memo("interpolation", lambda: self._interpolation(media))
        rows = [
            self._rows(self._pixel_values(media, part), index[part], weights[part])
            for start in range(0, units, _PATCHES_PER_SLICE)
            for part in [slice(start, min(start + _PATCHES_PER_SLICE, units))]
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def _pixel_values(self, media: Media, part: slice) -> Tensor:
        """Pixel values of some patches in the run's dtype."""
        table = isinstance(media, PixelBatch)
        if table is not (media.values.dtype == torch.uint8):
            raise ValueError(
                f"values are {media.values.dtype}, with {'a' if table else 'no'} table"
            )
        if isinstance(media, PixelBatch):
            return media.pixel_values(self.dtype, part.start, part.stop)
        return media.values[part].to(self.dtype)

    def _interpolation(self, media: Media) -> tuple[Tensor, Tensor]:
        index, weights = interpolation(media.grids, self.merge, self.pos_embed.side)
        return index.to(media.values.device), weights.to(media.values.device)

    def _rows(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = self.patch_embed.proj(x)
        return out + self.pos_embed(index, weights).to(out.dtype)

    def sample(
        self, units: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Media:
        """A synthetic image of about `units` patches, as close to a square as possible.

        Args:
            units: number of patches, rounded up to a rectangle of whole blocks.
            device: device of the result.
            generator: CPU generator for the bytes; ``None`` leaves them uninitialized.
        """
        blocks = max(1, -(-units // self.merge**2))
        high = math.isqrt(blocks)
        grid = (1, high * self.merge, -(-blocks // high) * self.merge)
        shape, cpu = (math.prod(grid), self.patch), torch.device("cpu")
        if generator is None:
            values = torch.empty(shape, dtype=torch.uint8, device=device)
        else:
            values = torch.randint(256, shape, dtype=torch.uint8, device=cpu, generator=generator)
        table = torch.linspace(-1, 1, 256, device=cpu).repeat(1, self.channels, 1)
        return PixelBatch(
            values=values.to(device),
            grids=(grid,),
            where=torch.arange(shape[0] // self.merge**2, device=device),
            table=table.to(device),
            kinds=torch.zeros(shape[0], dtype=torch.uint8, device=device),
        )


def build(ctx: BuildContext) -> TowerProtocol:
    """Build the tower that the config in `ctx` describes."""
    return Tower(ctx)
