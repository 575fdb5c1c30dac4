"""The embedding and the head of base, base + adapter and merge, to verify a merge.

This file decides which rows of the embedding are read for the random tokens (a few, among them rows
that the adapter replaces), and how logits are computed: a block of rows of the head at a time,
because both are the largest matrices of a model. `qcore.merging.streams` runs the layers between
them.

Shapes: T tokens, H hidden size, n rows of the embedding that the tokens use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapter.changes import Pair
from ..adapter.peft_names import Adapter, trunk_part
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import Layout
from .disk_rows import blocks, gather, row_slices, rows_of
from .folds import Folds
from .written_merge import WrittenMerge

#: Called with the place, and the differences and the sizes that `qcore.merging.streams` compares.
Judge = Callable[[str, float, float, float], None]


class Rows(NamedTuple):
    """Rows of the embedding ``[n, H]`` in each stream."""

    base: Tensor
    adapted: Tensor
    merged: Tensor


class Vocabulary:
    """The embedding and the head of one merge.

    Args:
        checkpoint: the base.
        layout: its layout.
        head: canonical name of the tensor that scores the vocabulary.
        adapter: the adapter.
        folds: computes its changes as base + adapter does.
        written: computes the sums of the merge, and compares them with the files.

    Attributes:
        entry: the embedding.
        proved: the changed ones among embedding and head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        head: str,
        adapter: Adapter,
        folds: Folds,
        written: WrittenMerge,
    ) -> None:
        self._checkpoint, self._layout, self._head = checkpoint, layout, head
        self._adapter, self._folds, self._written = adapter, folds, written
        trunk = trunk_part(layout.table)
        self.entry = next(e for e in layout.table if e.part is trunk and e.row.group == "embed")
        self.proved: set[str] = set()

    def rows(self, count: int) -> Rows:
        """Read rows of the embedding: `count` at most, at first those that the adapter changes."""
        size = self.entry.shape[0]
        generator = torch.Generator().manual_seed(0)
        random = torch.randint(size, (count,), generator=generator).tolist()
        changed = [*self._added(), *self._replaced()]
        picked = [*dict.fromkeys((*changed[: count // 2], *random))]
        rows = [picked[number % len(picked)] for number in range(min(count, size))]
        item = self._layout.located[self.entry.name]
        base = gather(self._checkpoint, item, rows)
        if self.entry.name not in self._adapter.folded:
            return Rows(base, base, base)
        adapted, merged = base.clone(), base.clone()
        for slot, row in enumerate(rows):
            own = slice(row, row + 1)
            here = slice(slot, slot + 1)
            adapted[here] = self._folds.value(self.entry.name, base[here], rows_of(item, own))
            self._written.add(item, merged[here], own)
        return Rows(base, adapted, merged)

    def _added(self) -> range:
        """Return the rows of the embedding that the base does not have."""
        item = self._layout.located[self.entry.name]
        return range(item.stored.shape[0], item.tensor.shape[0])

    def _replaced(self) -> list[int]:
        """Return rows of the embedding that the adapter replaces."""
        change = self._adapter.changes.get(self.entry.name)
        saved = change.under if isinstance(change, Pair) else change
        return list(saved.rows or ()) if saved is not None else []

    def compare(
        self, base: Tensor, adapted: Tensor, merged: Tensor, judge: Judge
    ) -> dict[str, float]:
        """Return the largest differences of logits between the streams.

        Args:
            base: what the head reads ``[T, H]``, of the base.
            adapted: of base + adapter.
            merged: of the merge.
            judge: compares the head alone, if the adapter changes it.
        """
        difference = effect = scale = off = added = 0.0
        item = self._layout.located[self._head]
        changed = self._head in self._adapter.folded
        for rows, block in zip(row_slices(item), blocks(self._checkpoint, item), strict=True):
            with_adapter, after_merge = block, block
            if changed:
                with_adapter = self._folds.value(self._head, block, rows_of(item, rows))
                after_merge = self._written.add(item, block.clone(), rows)
            logits, plain = adapted @ with_adapter.t(), base @ block.t()
            difference = max(difference, float((merged @ after_merge.t() - logits).abs().max()))
            effect = max(effect, float((logits[: len(plain)] - plain).abs().max()))
            scale = max(scale, float(logits.abs().max()))
            if changed:
                off = max(off, float((adapted @ after_merge.t() - logits).abs().max()))
                added = max(added, float((logits - adapted @ block.t()).abs().max()))
        if changed:
            judge(self._head, off, added, scale)
            self.proved.add(self._head)
        if self.entry.name in self._adapter.folded and self.entry.name != self._head:
            self._written.check(self._layout.located[self.entry.name])
            self.proved.add(self.entry.name)
        return {"difference": difference, "effect": effect, "scale": scale}
