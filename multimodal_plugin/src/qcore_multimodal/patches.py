"""Patches as they reach a tower: their numbers, and the embedding of position that is added.

This file decides that values may stay bytes until the device, with a table of the numbers that
the processor makes of them, and how the learned square of position embeddings is stretched over a
frame's grid: bilinear, corner on corner.

Shapes: U patches of all media, C channels, F numbers of a patch laid out (C, T, P, P).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcore.nn.protocols import Media

from .rope import Grids, places


@dataclass(slots=True)
class Pixels(Media):
    """Media whose values are bytes.

    Attributes:
        table: ``[C, 256]`` float32, the number that each byte of a channel stands for; ``None``
            where `values` are numbers already.
    """

    table: Tensor | None = None


def numbers(values: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The processor's numbers of patches, ``[U, F]``.

    Args:
        values: ``[U, F]``, bytes if there is a table.
        table: as `Pixels.table`.
        dtype: of the run; a float32 number is rounded to it once.

    Raises:
        ValueError: bytes without a table, or a table of what are no bytes.
    """
    if (table is None) is (values.dtype == torch.uint8):
        raise ValueError(f"values are {values.dtype}, with {'no' if table is None else 'a'} table")
    if table is None:
        return values.to(dtype)
    # Channel by channel: an index is four times as wide as a byte.
    channels = values.unflatten(1, (len(table), -1)).unbind(1)
    found = [
        row.index_select(0, channel.flatten().int()).view(channel.shape)
        for row, channel in zip(table.to(dtype), channels, strict=True)
    ]
    return torch.cat(found, 1)


def taps(grids: Grids, merge: int, side: int) -> tuple[Tensor, Tensor]:
    """Which learned positions a patch's is a mean of, and their weights; on the CPU.

    Args:
        grids: of the media, in order.
        merge: patches along each side of a block.
        side: learned positions along each side of their square.

    Returns:
        ``[U, 4]`` int64 and ``[U, 4]`` float32.
    """
    axes, step = [], torch.arange(2, device="cpu")
    for axis, place in enumerate(places(grids, merge), 1):
        lengths = torch.tensor([grid[axis] for grid in grids], device=place.device)
        counts = torch.tensor([grid[0] * grid[1] * grid[2] for grid in grids], device=place.device)
        last = (lengths - 1).clamp(min=1).repeat_interleave(counts)
        exact = place.float() * (side - 1) / last
        low = exact.floor()
        near = low[:, None].long() + step
        shares = 1 - ((exact - low)[:, None] - step).abs()
        axes.append((near.clamp(max=side - 1), shares))
    (rows, by_row), (columns, by_column) = axes
    index = rows[:, :, None] * side + columns[:, None]
    return index.flatten(1), (by_row[:, :, None] * by_column[:, None]).flatten(1)
