"""Reads the values of a `Replacement` from the adapter file, a few rows at a time.

This file decides that saved values are never held as a whole: a head and an embedding are the
largest tensors of a model. `qcore.adapter.delta` puts them into the weights.

Code: ``QC-MERGE-003`` a value is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..api.parameters import Region
from ..checkpoint.checkpoint import Header
from ..errors import NumericError
from ..nn.load import DTYPES, as_bytes, read_exact
from .changes import Replacement

_BLOCK = 2**18  #: elements of a weight converted to float64 at a time


def check_finite(value: Tensor, path: Path, header: Header) -> None:
    """Raise ``QC-MERGE-003`` if a tensor of the adapter contains a NaN or an infinity."""
    if not bool(torch.isfinite(value).all()):
        raise NumericError(
            "QC-MERGE-003",
            "contains a value that is not finite",
            file=path / header.file,
            field=header.name,
            fix="train again",
        )


class ReplacedValues:
    """The values that take the place of a weight, or of some of its rows.

    Args:
        path: the adapter folder.
        change: the weight, and the tensor of the adapter.
    """

    def __init__(self, path: Path, change: Replacement) -> None:
        self._path, self._change = path, change
        rows = change.rows
        self._slots = None if rows is None else {row: slot for slot, row in enumerate(rows)}
        self._under = None if change.under is None else ReplacedValues(path, change.under)

    def all(self) -> Tensor:
        """Return all values of trained rows, float32 ``[n, ...]``."""
        return self._read(slice(0, self._change.values.shape[0])).float()

    def over(self, weight: Tensor, region: Region) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute the new values of a region, some rows at a time.

        Args:
            weight: ``tensor[region]``, contiguous, in the shape of the region.
            region: slices of the canonical tensor, one for each dimension.

        Yields:
            A view of some rows of `weight`, and the float64 values for them.
        """
        first, *rest = region
        step = max(1, _BLOCK // max(1, weight[0].numel()))
        for at in range(0, len(weight), step):
            view = weight[at : at + step]
            rows = slice(first.start + at, first.start + at + len(view))
            if self._slots is None:
                yield view, self._first_rows(view, rows, rest)
                continue
            below = self._under
            total = view.double() if below is None else below._first_rows(view, rows, rest)
            for row in range(rows.start, rows.stop):
                slot = self._slots.get(row)
                if slot is not None:
                    new = self._read(slice(slot, slot + 1))[(slice(None), *rest)]
                    total[row - rows.start] = new[0].double()
            yield view, total

    def _first_rows(self, view: Tensor, rows: slice, rest: list[slice]) -> Tensor:
        """Return the values of a whole weight; rows beyond them stay those of the base.

        Args:
            view: ``tensor[rows]`` of the base.
            rows: of the weight.
            rest: slices of the other dims.
        """
        count = self._change.values.shape[0]
        if rows.stop <= count:
            return self._read(rows)[(slice(None), *rest)].double()
        total = view.double()
        if rows.start < count:
            own = self._read(slice(rows.start, count))[(slice(None), *rest)]
            total[: len(own)] = own.double()
        return total

    def _read(self, rows: slice) -> Tensor:
        """Read ``values[rows]`` in the dtype of the file."""
        header = self._change.values
        shape = (rows.stop - rows.start, *header.shape[1:])
        value = torch.empty(shape, dtype=DTYPES[header.dtype])
        each = (header.end - header.start) // header.shape[0]
        with (self._path / header.file).open("rb") as file:
            file.seek(header.start + rows.start * each)
            read_exact(file, as_bytes(value), header)
        check_finite(value, self._path, header)
        return value
