"""Rotary position embedding of Qwen 3.5: frequencies, YaRN, interleaved media axes, rotation.

This file decides which part of a head rotates (the first ``partial_rotary_factor`` of it), which
axis drives which frequency, how YaRN scales the frequencies, and that angles are computed in
float32 and cosines rounded to the run's dtype before the product. `guards` refuses other rope
scaling.

Shapes: T tokens, D head size, n rotating dimensions, positions ``[T]`` or ``[3, T]`` (time,
height, width; equal for text).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcore.api import Packed

from .table import rope_type, rotary_factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), with the arithmetic of transformers.

    Frequencies with many turns within the trained context are unchanged, those with few turns are
    divided by `factor`, and those in between are blended.

    Attributes:
        factor: ratio of extended to trained context.
        original: the trained context in tokens.
        fast: number of turns within `original` above which a frequency is unchanged.
        slow: number of turns below which a frequency is divided by the full factor.
        truncate: whether the bounds of the blend are rounded outward to whole frequencies.
        scaling: multiplies cosines and sines; sharpens attention.
    """

    factor: float
    original: int
    fast: float
    slow: float
    truncate: bool
    scaling: float

    @staticmethod
    def of(numbers: Mapping[str, Any]) -> Yarn:
        """From ``rope_parameters``; 0 and null count as absent, as in transformers."""
        factor = float(numbers["factor"])
        scaling = numbers.get("attention_factor")
        if scaling is None:
            over, under = numbers.get("mscale"), numbers.get("mscale_all_dim")
            if over and under:
                scaling = _sharpness(factor, over) / _sharpness(factor, under)
            else:
                scaling = _sharpness(factor)
        return Yarn(
            factor=factor,
            original=numbers["original_max_position_embeddings"],
            fast=float(numbers.get("beta_fast") or 32),
            slow=float(numbers.get("beta_slow") or 1),
            truncate=bool(numbers.get("truncate", True)),
            scaling=float(scaling),
        )

    def blend(self, periods: Tensor, theta: float, dim: int) -> Tensor:
        """Frequencies ``[n/2]`` from the unscaled periods ``[n/2]``, both float32."""
        low, high = (self._index(turns, theta, dim) for turns in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        number = torch.arange(dim // 2, dtype=torch.float, device=periods.device)
        stays = 1 - ((number - low) / (high - low)).clamp(0, 1)
        return 1.0 / (self.factor * periods) * (1 - stays) + 1.0 / periods * stays

    def _index(self, turns: float, theta: float, dim: int) -> float:
        """The index of the frequency that makes `turns` turns within the trained context."""
        return dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _sharpness(factor: float, scale: float = 1) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Parameters of a model's rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        dim: n, the number of rotating dimensions per head.
        section: frequencies per axis (time, height, width), interleaved.
        yarn: context extension; ``None`` without one.
    """

    theta: float
    dim: int
    section: tuple[int, int, int]
    yarn: Yarn | None = None

    @staticmethod
    def of(text: Mapping[str, Any]) -> Rope:
        """From the text section of config.json, which `guards` has validated."""
        numbers = text["rope_parameters"]
        factor = rotary_factor(text)
        time, height, width = numbers.get("mrope_section") or (11, 11, 10)
        return Rope(
            theta=float(numbers["rope_theta"]),
            dim=int(text["head_dim"] * factor),
            section=(time, height, width),
            yarn=Yarn.of(numbers) if rope_type(text) == "yarn" else None,
        )

    @property
    def scaling(self) -> float:
        """Factor on cosines and sines."""
        return 1.0 if self.yarn is None else self.yarn.scaling

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """Radians per position ``[n/2]``, float32."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float, device=device)
        periods = self.theta ** (exponents / self.dim)
        if self.yarn is not None:
            return self.yarn.blend(periods, self.theta, self.dim)
        plain: Tensor = 1.0 / periods
        return plain

    def tables(self, batch: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[T, 1, n]`` of a batch, computed once for all layers."""
        return batch.memo(f"rope {self} {dtype}", lambda: self._tables(batch.positions, dtype))

    def _tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions.unsqueeze(-1).float() * self.frequencies(positions.device)
        if positions.dim() == 2:
            angles = interleave(angles, self.section)
        angles = torch.cat((angles, angles), -1).unsqueeze(1)
        return (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)


def interleave(angles: Tensor, section: tuple[int, int, int]) -> Tensor:
    """``[3, T, n/2] -> [T, n/2]``: frequency j uses axis j % 3 within that axis's section."""
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
