"""Rows -> packs on the device: ids, targets, positions, and what a tower reads.

This file decides how rows lie in a pack and what of media is computed once. A frozen tower gives
the same for a medium in every step, so its outputs wait in the host's memory, as many as a bound
holds, the one that was used longest ago leaving first. There each medium is computed by itself:
what it gives then depends on nothing that happened before, and a run that was stopped goes on
bit for bit. Which rows meet is `schedule`'s, what media are is the modality's reader's.

Shapes: T tokens, n embeddings of media, H hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from ..api.blocks import Media, Packed
from ..api.media import MediaReader, Medium
from ..data.masking import Example
from ..nn.model import Model


def pack(batch: Sequence[Example]) -> Packed:
    """Rows -> one pack without its media; each position's target is the next token's label.

    Positions have as many axes as media need, ``[axes, T]``, where any row has media: along each
    of them the tokens of a row without are numbered as ever.
    """
    ids = [torch.frombuffer(example.ids, dtype=torch.int32).long() for example in batch]
    targets = []
    for example in batch:
        labels = torch.frombuffer(example.labels, dtype=torch.int32).long()
        targets.append(torch.cat([labels[1:], labels.new_full((1,), -100)]))
    packed = Packed.of(ids, targets)
    axes = max((len(one.placed.positions) for one in batch if one.placed is not None), default=0)
    if not axes:
        return packed
    return replace(packed, positions=torch.cat([_positions(one, axes) for one in batch], 1))


def _positions(example: Example, axes: int) -> Tensor:
    """``[axes, T]``."""
    if example.placed is None:
        return torch.arange(len(example.ids)).expand(axes, -1)
    return torch.stack([torch.tensor(axis, dtype=torch.int64) for axis in example.placed.positions])


def _where(batch: Sequence[Example]) -> Tensor:
    """``[n]``: the tokens of a pack whose embeddings the tower makes, in its order."""
    starts = accumulate((len(example.ids) for example in batch), initial=0)
    return torch.cat(
        [
            torch.tensor(example.placed.where, dtype=torch.int64) + start
            for example, start in zip(batch, starts, strict=False)
            if example.placed is not None
        ]
    )


class Batches:
    """Packs of one run.

    Args:
        model: whose tower computes the media.
        device: of the model.
        reader: of the checkpoint's modality; ``None`` where no row has media.
        keep: bytes of the host that outputs of a frozen tower may take; 0: none are kept.
    """

    def __init__(
        self, model: Model, device: torch.device, reader: MediaReader | None = None, keep: int = 0
    ) -> None:
        self.model = model
        self.device = device
        self.reader = reader
        self._kept = None if model.trains_tower or not keep else _Kept(keep)

    def of(self, batch: Sequence[Example]) -> Packed:
        """The pack of some rows, on the device."""
        packed = pack(batch)
        media = [medium for example in batch for medium in example.media]
        if not media:
            return packed.to(self.device)
        assert self.reader is not None, "rows with media come from a reader"
        where = _where(batch)
        if self._kept is None:
            return replace(packed, media=self.reader.batch(media, where)).to(self.device)
        features = torch.cat([self._features(medium, self._kept) for medium in media])
        known = Media(values=features.new_empty(0, 0), grids=(), where=where, features=features)
        return replace(packed, media=known).to(self.device)

    @torch.no_grad()
    def _features(self, medium: Medium, kept: _Kept) -> Tensor:
        """``[n, H]`` of one medium, on the host."""
        found = kept.get(medium.digest)
        if found is None:
            assert self.reader is not None
            alone = self.reader.batch([medium], torch.arange(medium.tokens)).to(self.device)
            found = self.model.media(alone).cpu()
            kept.put(medium.digest, found)
        return found


class _Kept:
    """Tensors by digest, at most so many bytes of them; the longest unused leaves first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, digest: str) -> Tensor | None:
        found = self._tensors.get(digest)
        if found is not None:
            self._tensors.move_to_end(digest)
        return found

    def put(self, digest: str, tensor: Tensor) -> None:
        self._tensors[digest] = tensor
        self._bytes += tensor.nbytes
        while self._bytes > self._most:
            _, old = self._tensors.popitem(last=False)
            self._bytes -= old.nbytes
