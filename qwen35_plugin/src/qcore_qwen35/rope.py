"""Rotary positions: tables from the config, the interleaved axes of media, the rotation.

This file decides which part of a head rotates (the first ``partial_rotary_factor`` of it),
which axis drives which frequency, and that angles are computed in float32 and cosines rounded
to the run's dtype before the product. Scaled forms of rope (yarn and the like) are refused.

Shapes: T tokens, D head size, n rotating dimensions, positions ``[T]`` or ``[3, T]`` (time,
height, width; equal for text).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcore.nn.protocols import Packed

from .table import rotary_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """The numbers of one model's rotary positions.

    Attributes:
        theta: base of the frequencies.
        dim: n, how many dimensions of a head rotate.
        section: frequencies per axis (time, height, width), interleaved.
    """

    theta: float
    dim: int
    section: tuple[int, int, int]

    @staticmethod
    def of(text: Mapping[str, Any]) -> Rope:
        """Read the text section of config.json, which `guards` has judged."""
        numbers = text["rope_parameters"]
        factor = rotary_factor(text)
        time, height, width = numbers.get("mrope_section") or (11, 11, 10)
        return Rope(
            theta=float(numbers["rope_theta"]),
            dim=int(text["head_dim"] * factor),
            section=(time, height, width),
        )

    def tables(self, batch: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[T, 1, n]`` of a batch, made once for all layers."""
        return batch.memo(f"rope {self} {dtype}", lambda: self._tables(batch.positions, dtype))

    def _tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float, device=positions.device)
        angles = positions.unsqueeze(-1).float() * (1.0 / self.theta ** (exponents / self.dim))
        if positions.dim() == 2:
            angles = interleave(angles, self.section)
        angles = torch.cat((angles, angles), -1).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def interleave(angles: Tensor, section: tuple[int, int, int]) -> Tensor:
    """``[3, T, n/2] -> [T, n/2]``: frequency j follows axis j % 3 while that axis has any left."""
    out = angles[0].clone()
    for axis in (1, 2):
        where = slice(axis, section[axis] * 3, 3)
        out[:, where] = angles[axis][:, where]
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first n of D dimensions, in pairs (j, j + n/2): ``[T, H, D] -> [T, H, D]``."""
    turning, still = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    first, second = turning.chunk(2, -1)
    turned = turning * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, still), -1)
