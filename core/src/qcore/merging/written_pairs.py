"""The matrices of an adapter that a verb computed: as tensors of its file, and read back.

This file decides the names of the tensors, and that the folder, read for its base as any other
adapter, must give the same matrices with scaling 1.

Code: ``QC-MERGE-005`` the folder holds other matrices.

Shapes: E experts, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..adapter.delta import Deltas
from ..adapter.evidence import read_for
from ..errors import NumericError
from ..plugins.resolve_model import Identified


class Matrices(Protocol):
    """The pair of one weight."""

    @property
    def a(self) -> Tensor:
        """``[r, in]``; of experts ``[E r, in]``."""
        ...

    @property
    def b(self) -> Tensor:
        """``[out, r]``; of experts ``[out, r E]``."""
        ...


def tensors_of(weights: Mapping[str, Matrices], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the matrices by their name in the adapter.

    Args:
        weights: the pairs by canonical name of the weight.
        names: names of the modules in the adapter, likewise.
    """
    tensors = {}
    for name, weight in weights.items():
        tensors[f"{names[name]}.lora_A.weight"] = weight.a
        tensors[f"{names[name]}.lora_B.weight"] = weight.b
    return tensors


def check_read_back(base: Identified, folder: Path, weights: Mapping[str, Matrices]) -> None:
    """Read an adapter folder for its base, and compare its matrices with those that it was made of.

    Args:
        base: the base.
        folder: the folder, before it is published.
        weights: the pairs by canonical name of the weight.

    Raises:
        NumericError: ``QC-MERGE-005``.
    """
    written = Deltas(read_for(base, folder, trust_base=True, trust_generation=True))
    for name in sorted(weights.keys() ^ written.pairs.keys()):
        raise _other(folder, name, "a pair" if name in written.pairs else "no pair")
    for name, weight in weights.items():
        if written.pairs[name].scaling != 1:
            raise _other(folder, name, f"scaling {written.pairs[name].scaling:g}")
        if not all(map(torch.equal, written.sides(name), (weight.a, weight.b))):
            raise _other(folder, name, "other values")


def _other(folder: Path, name: str, found: str) -> NumericError:
    return NumericError(
        "QC-MERGE-005",
        "does not hold the matrices that were computed",
        file=folder,
        field=name,
        found=found,
        expected="the computed matrices, with scaling 1",
        fix="report this: the adapter was written with other names, ranks or values",
    )
