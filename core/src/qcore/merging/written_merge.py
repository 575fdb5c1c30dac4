"""Adds an adapter to weights once more, and compares the written files with the sums.

This file decides that the files of a merge must hold each sum rounded once, in FP8 by the scales of
its blocks, and that experts are summed one at a time here, because the merge sums several at once.
`qcore.merging.streams` computes with the same sums what the merge computes.

Code: ``QC-MERGE-007`` a file holds another tensor.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from ..adapter.delta import WORKERS, Deltas, single
from ..api.parameters import Kind
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import Layout, Located, Place, survey
from ..checkpoint.layout_faults import faults
from ..errors import NumericError, raise_all
from ..nn.load import DTYPES, read_tensor, slabs
from .disk_rows import is_rounded, row_slices, rows_of
from .requantize import is_near, is_requantized

_CUT = 2**26  # bytes of a stack that one thread compares with the files at a time


class WrittenMerge:
    """The sums of one merge, and the files that must hold them.

    Args:
        checkpoint: the base.
        layout: its layout.
        deltas: the changes of the adapter.
        folder: the merged files.
    """

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, deltas: Deltas, folder: Path
    ) -> None:
        self._base, self._deltas = checkpoint, deltas
        self._checkpoint = Checkpoint.open(folder)
        self._layout, problems = survey(layout.table, self._checkpoint)
        raise_all(faults(problems))

    def add(self, item: Located, weight: Tensor, rows: slice) -> Tensor:
        """Add the adapter in place to ``weight = tensor[rows]``, and compare with the files."""
        for view, total in self._deltas.add(item.tensor.name, weight, rows_of(item, rows)):
            view.copy_(total)
        self._compare(item, rows, weight)
        return weight

    def check(self, item: Located) -> None:
        """Compare all of a tensor with the files, some rows or experts at a time."""
        if item.tensor.row.kind is not Kind.EXPERTS:
            for rows in row_slices(item):
                self.add(item, read_tensor(self._base, item, rows).float(), rows)
            return
        with ThreadPoolExecutor(WORKERS, initializer=single) as pool:
            parts = slabs(item, _CUT)
            for _ in pool.map(lambda rows: self._compare(item, rows, self.sum(item, rows)), parts):
                pass

    def sum(self, item: Located, rows: slice) -> Tensor:
        """Return some experts of a stack, float32, with the adapter added to one at a time."""
        weight = read_tensor(self._base, item, rows).float()
        for expert, matrix in zip(range(rows.start, rows.stop), weight, strict=True):
            region = rows_of(item, slice(expert, expert + 1))
            for view, total in self._deltas.add(item.tensor.name, matrix, region):
                view.copy_(total)
        return weight

    def _compare(self, item: Located, rows: slice, weight: Tensor) -> None:
        """Compare the files with `weight`, which is ``tensor[rows]``, rounded to their dtype."""
        there = self._layout.located[item.tensor.name]
        value = read_tensor(self._checkpoint, there, rows)
        weight = weight.view(value.shape)
        if not all(_holds(place, rows, value, weight) for place in there.places):
            header = there.places[0].header
            raise NumericError(
                "QC-MERGE-007",
                "does not hold the sum that was proved",
                file=self._checkpoint.path / header.file,
                field=item.tensor.name,
                fix="report this: the merge wrote another tensor than it computed",
            )


def _holds(place: Place, rows: slice, value: Tensor, weight: Tensor) -> bool:
    """Whether a tensor on disk holds its part of ``weight``, rounded once; its blocks are its own.

    Args:
        place: the tensor on disk.
        rows: of the canonical tensor (dim 0) in `value` and `weight`.
        value: what the files hold.
        weight: what they should hold, float32.
    """
    lies = place.region[0]
    start, stop = max(lies.start, rows.start), min(lies.stop, rows.stop)
    if start >= stop:
        return True
    region = (slice(start - rows.start, stop - rows.start), *place.region[1:])
    if place.scale is None:
        return is_rounded(value[region], weight[region])
    assert place.block is not None
    first, last = start - lies.start, stop - lies.start
    whole = first % place.block[0] == 0 and (last % place.block[0] == 0 or stop == lies.stop)
    if len(region) == 2 and not whole:
        return is_near(value[region], weight[region])
    return is_requantized(value[region], weight[region], place.block, DTYPES[place.scale.dtype])
