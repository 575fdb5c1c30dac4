"""Patch coordinates within a frame, and the rotary position embedding of the vision tower.

This file decides the order of patches: frame by frame, within a frame by blocks of
``merge x merge``, and row by row within a block, as the processor lays them out. Half of a head's
frequencies encode the row, half the column, in float32.

Shapes: U patches of all media, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcore.api import Media

from .table import THETA

Grids = Sequence[tuple[int, ...]]  #: per medium: patches in time, height and width
_CPU = torch.device("cpu")


def patch_coordinates(grids: Grids, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in its frame, ``[U]`` int64 each, on the CPU.

    Args:
        grids: grid of each medium, in order.
        merge: patches along each side of a block.
    """
    rows, columns = [], []
    for time, height, width in grids:
        shape = (height // merge, width // merge, merge, merge)
        row = torch.arange(height, device=_CPU).view(shape[0], 1, merge, 1)
        column = torch.arange(width, device=_CPU).view(1, shape[1], 1, merge)
        rows.append(row.expand(shape).flatten().repeat(time))
        columns.append(column.expand(shape).flatten().repeat(time))
    return torch.cat(rows), torch.cat(columns)


@dataclass(frozen=True, slots=True)
class Rope:
    """Parameters of a tower's rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        dim: D, all of which is rotated.
        merge: patches along each side of a block.
    """

    theta: float
    dim: int
    merge: int

    @staticmethod
    def of(vision: Mapping[str, Any]) -> Rope:
        """From ``vision_config``, which `guards` has validated."""
        numbers = vision.get("rope_parameters") or {}
        return Rope(
            float(numbers.get("rope_theta", THETA)),
            vision["hidden_size"] // vision["num_heads"],
            vision["spatial_merge_size"],
        )

    def tables(self, media: Media) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[U, 1, 1, D]`` float32, computed once for all layers."""
        return media.memo(f"rope {self}", lambda: self._tables(media))

    def _tables(self, media: Media) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.dim // 2, 2, dtype=torch.float, device=_CPU)
        frequencies = 1.0 / (self.theta ** (exponents / (self.dim // 2)))
        axes = [place.float().unsqueeze(1) * frequencies for place in self._coordinates(media)]
        angles = torch.cat((*axes, *axes), 1)[:, None, None].to(media.values.device)
        return angles.cos(), angles.sin()

    def _coordinates(self, media: Media) -> tuple[Tensor, Tensor]:
        return media.memo(
            f"coordinates {self.merge}", lambda: patch_coordinates(media.grids, self.merge)
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate D dimensions in pairs (j, j + D/2): ``[U, ..., D] -> [U, ..., D]``."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
