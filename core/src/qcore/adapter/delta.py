"""The adapter's matrices, and ``W + scaling * B A``: the one place where a delta is added.

This file decides the arithmetic of a merge: float64, a block of rows at a time, so that the
sum is rounded once, to the dtype of the file, and nothing of the size of a weight is made
beside it. `merge` writes the sums, `prove` compares them with what training computes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..api.parameters import Region
from ..errors import NumericError
from ..nn.load import DTYPES, as_bytes, read_exact
from .peft_names import WEIGHTS, Adapter

#: Threads that add up: one core is left to the thread that hashes and writes.
WORKERS = min(6, max(2, (os.cpu_count() or 2) - 1))
BLOCK = 2**18  #: elements of a weight that are in float64 at a time: they stay in the cache


@contextmanager
def one_thread() -> Iterator[None]:
    """Arithmetic of torch on one core: on blocks this small threads wait more than they add.

    On a machine that has other work, the waiting is most of the time; and another core hashes.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def single() -> None:
    """A worker of the merge computes on its own core alone."""
    torch.set_num_threads(1)


class Deltas:
    """The adapter's matrices and ``W + scaling * B A`` by region.

    Raises:
        NumericError: ``QC-MERGE-003`` for a NaN or an infinity in the adapter.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.pairs = adapter.pairs
        self._path = adapter.path / WEIGHTS
        self._values: dict[str, tuple[Tensor, Tensor]] = {}
        with one_thread(), self._path.open("rb") as file:
            for name, pair in adapter.pairs.items():
                sides = []
                for header in (pair.a, pair.b):
                    file.seek(header.start)
                    value = torch.empty(header.shape, dtype=DTYPES[header.dtype])
                    read_exact(file, as_bytes(value), header)
                    if not bool(torch.isfinite(value).all()):
                        raise NumericError(
                            "QC-MERGE-003",
                            "holds a value that is not finite",
                            file=self._path,
                            field=header.name,
                            fix="train again",
                        )
                    sides.append(value.float())
                self._values[name] = (sides[0], sides[1])

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a weight in PEFT's layout, float32."""
        return self._values[name]

    def add(self, name: str, weight: Tensor, region: Region) -> Iterator[tuple[Tensor, Tensor]]:
        """``weight + scaling * B A`` in float64, where `weight` is ``tensor[region]``.

        Args:
            name: canonical name of the tensor.
            weight: contiguous, of the region's values in any shape.
            region: of the canonical tensor.

        Yields:
            A view of some rows of `weight`, and their sum; the view may be written meanwhile.
        """
        *stack, rows, columns = region
        weight = weight.view([part.stop - part.start for part in region])
        slices = range(stack[0].start, stack[0].stop) if stack else [None]
        for values, number in zip(weight if stack else [weight], slices, strict=True):
            a, b = self._slice(name, number)
            a, b = a[:, columns].double(), b[rows].double()
            step = max(1, BLOCK // values.shape[1])
            for at in range(0, len(values), step):
                view = values[at : at + step]
                total = torch.addmm(
                    view.double(), b[at : at + step], a, alpha=self.pairs[name].scaling
                )
                yield view, total

    def _slice(self, name: str, number: int | None) -> tuple[Tensor, Tensor]:
        """``A [r, in]`` and ``B [out, r]`` of a weight, or of one expert of a stack."""
        a, b = self._values[name]
        if number is None:
            return a, b
        pair = self.pairs[name]
        experts = pair.tensor.shape[0]
        return a[number * pair.r : (number + 1) * pair.r], b[:, number::experts]
