"""Packs rows into one batch on the device, and caches outputs of a frozen vision tower.

This file decides how rows lie in a pack and which tower outputs are cached. A frozen tower gives
the same output for a medium in every step, so outputs are cached in host memory, up to a bound,
and the least recently used one is evicted first. Each medium is computed alone: its output does
not depend on the media beside it, so a resumed run is bit-exact. Which rows form a micro-batch
is up to `data.sampler`; what a medium is, to the reader of the modality.

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
from ..data.rendering.masking import Example
from ..nn.model import Model


def pack(batch: Sequence[Example]) -> Packed:
    """Collate rows into one pack without media; a position's target is the next token's label.

    Where any row has media, positions are ``[axes, T]``; a row of text has the same positions,
    0 to its length, on every axis.
    """
    ids = [torch.frombuffer(example.ids, dtype=torch.int32).long() for example in batch]
    targets = []
    for example in batch:
        labels = torch.frombuffer(example.labels, dtype=torch.int32).long()
        targets.append(torch.cat([labels[1:], labels.new_full((1,), -100)]))
    packed = Packed.of(ids, targets)
    axes = max((len(row.placed.positions) for row in batch if row.placed is not None), default=0)
    if not axes:
        return packed
    return replace(packed, positions=torch.cat([_positions(example, axes) for example in batch], 1))


def _positions(example: Example, axes: int) -> Tensor:
    """``[axes, T]``."""
    if example.placed is None:
        return torch.arange(len(example.ids)).expand(axes, -1)
    return torch.stack([torch.tensor(axis, dtype=torch.int64) for axis in example.placed.positions])


def _where(batch: Sequence[Example]) -> Tensor:
    """``[n]``: the tokens of a pack whose embeddings the tower computes, in order."""
    starts = accumulate((len(example.ids) for example in batch), initial=0)
    return torch.cat(
        [
            torch.tensor(example.placed.where, dtype=torch.int64) + start
            for example, start in zip(batch, starts, strict=False)
            if example.placed is not None
        ]
    )


class Batches:
    """Makes the packs of one run.

    Args:
        model: its tower computes the media.
        device: of the model.
        reader: of the checkpoint's modality; ``None`` where no row has media.
        keep: bytes of host memory for cached outputs of a frozen tower; 0: no cache.
    """

    def __init__(
        self, model: Model, device: torch.device, reader: MediaReader | None = None, keep: int = 0
    ) -> None:
        self.model = model
        self.device = device
        self.reader = reader
        self._cache = None if model.trains_tower or not keep else _FeatureCache(keep)

    def of(self, batch: Sequence[Example]) -> Packed:
        """The pack of some rows, on the device."""
        packed = pack(batch)
        media = [medium for example in batch for medium in example.media]
        if not media:
            return packed.to(self.device)
        assert self.reader is not None, "rows with media come from a reader"
        where = _where(batch)
        if self._cache is None:
            return replace(packed, media=self.reader.batch(media, where)).to(self.device)
        features = torch.cat([self._features(medium, self._cache) for medium in media])
        known = Media(values=features.new_empty(0, 0), grids=(), where=where, features=features)
        return replace(packed, media=known).to(self.device)

    @torch.no_grad()
    def _features(self, medium: Medium, cache: _FeatureCache) -> Tensor:
        """``[n, H]`` of one medium, on the host."""
        features = cache.get(medium.digest)
        if features is None:
            assert self.reader is not None
            alone = self.reader.batch([medium], torch.arange(medium.tokens)).to(self.device)
            features = self.model.media(alone).cpu()
            cache.put(medium.digest, features)
        return features


class _FeatureCache:
    """Tensors by digest, of a bounded size; the least recently used is evicted first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._tensors: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, digest: str) -> Tensor | None:
        features = self._tensors.get(digest)
        if features is not None:
            self._tensors.move_to_end(digest)
        return features

    def put(self, digest: str, tensor: Tensor) -> None:
        self._tensors[digest] = tensor
        self._bytes += tensor.nbytes
        while self._bytes > self._most:
            _, old = self._tensors.popitem(last=False)
            self._bytes -= old.nbytes
