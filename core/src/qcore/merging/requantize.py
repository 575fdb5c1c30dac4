"""Writes changed weights of a base in block FP8 back to block FP8, with scales computed anew.

This file decides the arithmetic: ``W' = decoded + change`` in float32, for each block the scale
``max |W'| / 448``, rounded to the dtype of the scales, and ``W' / scale`` rounded to the nearest
8-bit float. FP8 has three bits of mantissa, so each weight is reported with its error. Weights that
the adapter does not change keep their bytes. `qcore.merging.rewrite` decides the order of tensors.

Shapes: a weight or stack ``[..., out, in]``, its scales ``[..., ceil(out/b0), ceil(in/b1)]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter.delta import Deltas
from ..api.parameters import Region
from ..nn.fp8 import dequantize

_LARGEST = 448.0  # of e4m3
#: Shares of a value, and of the largest of its tensor, by which its rounding may move it: half a
#: step of e4m3 and the rounding of scale and decoded value; half a step near zero.
_NEAR, _ZERO = 2**-4 + 2**-7, 2**-18
#: Share of values that may round to their other neighbor: float32 summed in another order.
_TIES = 1e-5


class Requantized(NamedTuple):
    """A changed weight, or some slices of a stack, in block FP8.

    Attributes:
        weight: 8-bit floats.
        scales: its scales, in the dtype of the base's.
        moved: largest difference from the decoded base.
        sums: squares of the rounding error, of the sum and of the change.
        largest: largest absolute rounding error.
    """

    weight: Tensor
    scales: Tensor
    moved: float
    sums: Tensor
    largest: float


@dataclass(slots=True)
class Errors:
    """The rounding errors of one tensor, slice by slice.

    Attributes:
        sums: squares of the rounding error, of the sum and of the change, float64.
        largest: largest absolute rounding error.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    largest: float = 0.0

    def add(self, part: Requantized) -> None:
        """Add the errors of some slices."""
        self.sums += part.sums
        self.largest = max(self.largest, part.largest)

    def as_json(self) -> dict[str, float]:
        """Return the error as shares of the norms of the weight and of its change."""
        error, total, change = (math.sqrt(float(value)) for value in self.sums)
        return {
            "of_weight": error / total if total else 0.0,
            "of_change": error / change if change else 0.0,
            "largest": self.largest,
        }


def requantize(
    deltas: Deltas,
    name: str,
    decoded: Tensor,
    region: Region,
    block: tuple[int, int],
    scale_dtype: torch.dtype,
) -> Requantized:
    """Change a weight and quantize the result.

    Args:
        deltas: the adapter.
        name: canonical name of the weight.
        decoded: ``tensor[region]`` of the base, decoded; not modified.
        region: slices of the canonical tensor.
        block: rows and columns that share a scale.
        scale_dtype: of the scales.
    """
    before = decoded.float()
    total = before.clone()
    for view, values in deltas.add(name, total, region):
        view.copy_(values)
    scales = block_scales(total, block).to(scale_dtype)
    weight = _divided(total, scales, block)
    after = dequantize(weight, scales, block, torch.float32)
    error = after - total
    squares = [part.double().square().sum() for part in (error, total, total - before)]
    return Requantized(
        weight=weight,
        scales=scales,
        moved=float((after - before).abs().max()),
        sums=torch.stack(squares),
        largest=float(error.abs().max()),
    )


def block_scales(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the scale of each block, float32; 1 for a block of zeros."""
    rows, columns = weight.shape[-2:]
    padding = (0, -columns % block[1], 0, -rows % block[0])
    padded = torch.nn.functional.pad(weight, padding)
    grid = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    largest: Tensor = grid.abs().amax((-3, -1))
    return torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))


def _divided(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Return ``weight / scale`` by block as 8-bit floats; a rounded scale must not overflow."""
    spread = scales.float().repeat_interleave(block[1], -1)[..., : weight.shape[-1]]
    spread = spread.repeat_interleave(block[0], -2)[..., : weight.shape[-2], :]
    return (weight / spread).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def is_requantized(
    value: Tensor, exact: Tensor, block: tuple[int, int], scale_dtype: torch.dtype
) -> bool:
    """Return whether decoded FP8 values are `exact`, rounded to 8-bit floats with its own scales.

    Each must be near its exact value, and what these round to here must be the same but for ties:
    values of the base are often as near as those of the sum.

    Args:
        value: decoded, in any float dtype.
        exact: float32, before rounding; whole blocks.
        block: rows and columns that share a scale.
        scale_dtype: of the scales.
    """
    if not is_near(value, exact):
        return False
    scales = block_scales(exact, block).to(scale_dtype)
    again = dequantize(_divided(exact, scales, block), scales, block, value.dtype)
    return int((again != value).sum()) <= 1 + value.numel() * _TIES


def is_near(value: Tensor, exact: Tensor) -> bool:
    """Return whether each value is as near as an 8-bit float can be."""
    size = exact.abs()
    return bool(((value.float() - exact).abs() <= size * _NEAR + size.max() * _ZERO).all())


def summary(errors: Mapping[str, Mapping[str, float]]) -> str:
    """Return one line for the terminal."""
    worst = max(errors, key=lambda name: errors[name]["of_change"])
    middle = sorted(error["of_weight"] for error in errors.values())[len(errors) // 2]
    share = 100 * errors[worst]["of_change"]
    return (
        f"{len(errors)} weights in FP8 have new scales; rounding moves them by "
        f"{100 * middle:.2g} % (median), up to {share:.3g} % of the adapter's change ({worst})"
    )
