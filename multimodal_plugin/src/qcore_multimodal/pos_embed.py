"""Where patches lie, as an embedding that is added to theirs.

This file decides how the learned square of position embeddings is stretched over a frame's grid:
bilinear, corner on corner. What a patch's numbers are is `pixels`'.

Shapes: U patches of all media.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rope import Grids, patch_coordinates


def interpolation(grids: Grids, merge: int, side: int) -> tuple[Tensor, Tensor]:
    """Which learned positions a patch's is a mean of, and their weights; on the CPU.

    Args:
        grids: of the media, in order.
        merge: patches along each side of a block.
        side: learned positions along each side of their square.

    Returns:
        ``[U, 4]`` int64 and ``[U, 4]`` float32.
    """
    axes, step = [], torch.arange(2, device="cpu")
    for axis, place in enumerate(patch_coordinates(grids, merge), 1):
        lengths = torch.tensor([grid[axis] for grid in grids], device=place.device)
        counts = torch.tensor([grid[0] * grid[1] * grid[2] for grid in grids], device=place.device)
        last = (lengths - 1).clamp(min=1).repeat_interleave(counts)
        exact = place.float() * (side - 1) / last
        low = exact.floor()
        near = low[:, None].long() + step
        weights = 1 - ((exact - low)[:, None] - step).abs()
        axes.append((near.clamp(max=side - 1), weights))
    (rows, by_row), (columns, by_column) = axes
    index = rows[:, :, None] * side + columns[:, None]
    return index.flatten(1), (by_row[:, :, None] * by_column[:, None]).flatten(1)
