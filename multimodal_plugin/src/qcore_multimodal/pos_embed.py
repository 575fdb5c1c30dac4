"""Bilinear interpolation of the tower's learned position embeddings onto each frame's patch grid.

This file decides how the learned square of position embeddings is resized to a frame's grid:
bilinear, with corners aligned. `media_batch` decides the pixel values of a patch.

Shapes: U patches of all media.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rope import Grids, patch_coordinates


def interpolation(grids: Grids, merge: int, side: int) -> tuple[Tensor, Tensor]:
    """Indices and weights of the learned positions for every patch, on the CPU.

    Args:
        grids: grid of each medium, in order.
        merge: patches along each side of a block.
        side: learned positions along each side of the square.

    Returns:
        Indices ``[U, 4]`` int64 and weights ``[U, 4]`` float32.
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
