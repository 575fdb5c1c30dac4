"""Computes ``W + scaling * B A`` in float64, in blocks of rows; merges add LoRA nowhere else.

This file decides the arithmetic of a merge: float64, a block of rows at a time, so that the
sum is rounded once, to the dtype of the file, and no temporary has the size of a weight.
`qcore.merging` writes the sums and compares them with the forward of training.

Shapes: E experts, r rank of one LoRA pair.
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
from .peft_names import WEIGHTS, Adapter, Pair

#: Threads that add deltas; one core is left for the thread that hashes and writes.
WORKERS = min(6, max(2, (os.cpu_count() or 2) - 1))
BLOCK = 2**18  #: elements of a weight converted to float64 at a time; they fit in the CPU cache


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block.

    On blocks this small, threads spend more time waiting than adding, above all on a busy machine,
    and another core hashes meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def single() -> None:
    """Limit torch to one thread; the initializer of a merge worker."""
    torch.set_num_threads(1)


class Deltas:
    """The matrices of an adapter, in memory, and ``W + scaling * B A`` for a region of a weight.

    Args:
        adapter: the adapter; all of its matrices are read.

    Attributes:
        pairs: the adapter's pairs, by canonical name of the weight.

    Raises:
        NumericError: ``QC-MERGE-003`` the adapter contains a NaN or an infinity.
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
                            "contains a value that is not finite",
                            file=self._path,
                            field=header.name,
                            fix="train again",
                        )
                    sides.append(value.float())
                a, b = sides
                self._values[name] = _as_newer(pair, a, b) if pair.older else (a, b)

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a weight, float32, in the layout of PEFT 0.21 (see `Pair`)."""
        return self._values[name]

    def add(self, name: str, weight: Tensor, region: Region) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute ``weight + scaling * B A`` in float64, where `weight` is ``tensor[region]``.

        Args:
            name: canonical name of the tensor.
            weight: the values of the region, contiguous, in any shape.
            region: slices of the canonical tensor, one for each dimension.

        Yields:
            A view of some rows of `weight`, and the float64 sum for them. The caller may write
            to the view before it takes the next one.
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
        """Return ``A [r, in]`` and ``B [out, r]`` of a weight, or of one expert of a stack."""
        a, b = self._values[name]
        if number is None:
            return a, b
        pair = self.pairs[name]
        experts = pair.tensor.shape[0]
        return a[number * pair.r : (number + 1) * pair.r], b[:, number::experts]


def _as_newer(pair: Pair, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rearrange expert matrices from the layout of PEFT before 0.19.1 to that of `Pair`.

    The delta of expert e is ``A_e^T B_e^T``, so its ``B^T`` is today's A and its ``A^T`` is today's
    B.

    Args:
        pair: the pair of a stack of experts.
        a: ``[E r, out]``, row ``e r + k`` of expert e.
        b: ``[in, r E]``, column ``k E + e`` of expert e.
    """
    experts = pair.tensor.shape[0]
    by_expert = b.view(b.shape[0], pair.r, experts).permute(2, 1, 0)
    by_rank = a.view(experts, pair.r, a.shape[1]).permute(2, 1, 0)
    return by_expert.reshape(experts * pair.r, -1), by_rank.reshape(-1, pair.r * experts)
