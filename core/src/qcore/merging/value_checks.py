"""Checks of the values that a merge writes: how large a change is, and which values are not finite.

A change whose norm exceeds `LARGEST` times that of its weight replaces the weight by the adapter:
a wrong alpha, a wrong base, or a run that diverged. The bound is a judgment: far above 1, so that a
small weight that training changes much is not refused.

A tensor that no change touches is copied, also where it holds a NaN or an infinity: the base had
it. Such a tensor is named.

Code: ``QC-MERGE-014`` the change of a weight is too large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from ..checkpoint.checkpoint import Header
from ..errors import NumericError
from ..nn.load import DTYPES
from ..nn.value_range import is_finite

LARGEST: Final = 10.0  #: norm of a change as a multiple of that of its weight
_WIDE: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(slots=True)
class ChangeSizes:
    """The relative norms of changes, tensor by tensor.

    Attributes:
        adapter: its folder, for the error.
        allowed: a change may be of any size.
        largest: the largest relative norm of a change so far.
        where: the tensor with it.
    """

    adapter: Path
    allowed: bool = False
    largest: float = 0.0
    where: str = ""
    _squares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, change: float, base: float) -> None:
        """Add squared norms of a part of a tensor."""
        before = self._squares.get(name, (0.0, 0.0))
        self._squares[name] = before[0] + change, before[1] + base

    def close(self, name: str) -> None:
        """Judge a tensor of which all parts were added. A weight of zeros has no relative norm.

        Raises:
            NumericError: ``QC-MERGE-014``.
        """
        change, base = self._squares.pop(name, (0.0, 0.0))
        if not base:
            return
        ratio = math.sqrt(change / base)
        if ratio > self.largest:
            self.largest, self.where = ratio, name
        if ratio > LARGEST and not self.allowed:
            raise NumericError(
                "QC-MERGE-014",
                "would change by many times its own norm",
                file=self.adapter,
                field=name,
                found=f"a change of {ratio:.3g} times the norm of the weight",
                expected=f"at most {LARGEST:g}",
                fix="check lora_alpha, r and the base of the adapter, or pass --allow-large-change",
            )


def watched(
    chunks: Iterator[memoryview], header: Header, not_finite: set[str], name: str
) -> Iterator[memoryview]:
    """Pass on the bytes of a copied tensor; add `name` to `not_finite` if a value is not.

    Codes of quantized tensors are not looked at: their scales are tensors of their own.

    Args:
        chunks: whole values.
        header: of the tensor.
        not_finite: names of tensors with such a value.
        name: of the tensor.
    """
    dtype = DTYPES.get(header.dtype)
    for chunk in chunks:
        if dtype in _WIDE and name not in not_finite and len(chunk):
            assert dtype is not None
            if not is_finite(torch.frombuffer(chunk, dtype=dtype)):
                not_finite.add(name)
        yield chunk


def not_finite_line(names: set[str]) -> str:
    """What the user reads of tensors of the base that are not finite."""
    first, *others = sorted(names)
    more = f" and {len(others)} more" if others else ""
    return (
        f"the base holds a NaN or an infinity in {first}{more}, which the adapter does not change: "
        "the output holds the same values"
    )
