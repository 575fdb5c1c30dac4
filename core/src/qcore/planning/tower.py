"""Memory and work of a vision tower, measured by running it once on the meta device.

This file decides the segments of a tower: its input, one layer of each kind, and its output. The
tower makes sample media (`Tower.sample`) and is run by the training code, so authors of towers
write no cost model. `qcore.planning.step` decides where in a step it runs.

Layers below everything that is trained have no gradient and save nothing, so they are separate
segments. Towers are measured at full size, because launches grow with the number of media and not
with their units.

Shapes: U units, D the tower's width; n embeddings, H the trunk's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..api.blocks import Media, Tower
from ..nn.model import Model
from ..nn.recompute import run_layers
from .runner import META, Bench, signature
from .segments import Segment
from .trace import rounded

_WARM = 64


@dataclass(frozen=True, slots=True)
class _MediaSample:
    """Media after a layer of each kind has seen them.

    Attributes:
        media: all that is derived of them is there.
        nbytes: theirs, with what is derived.
        input: ``[U, D]``, of no storage that counts: what layers read.
        output: ``[n, H]``, the same of what the last one gives.
    """

    media: Media
    nbytes: int
    input: tuple[tuple[int, ...], torch.dtype]
    output: tuple[tuple[int, ...], torch.dtype]


class TowerMeasure:
    """A model's tower on the meta device and what was seen of it.

    Args:
        model: on meta, with a tower.
        bench: where segments are run.

    Attributes:
        trained: whether it has a backward.
        working: bytes that it makes of its weights at first use, and keeps.
    """

    def __init__(self, model: Model, bench: Bench) -> None:
        tower = model.tower
        assert tower is not None
        self._model, self._bench = model, bench
        self._tower: Tower = tower
        self._kinds = [signature(cast(nn.Module, layer)) for layer in tower.layers]
        self._layer_by_kind = {kind: tower.layers[self._kinds.index(kind)] for kind in self._kinds}
        self._samples: dict[int, _MediaSample] = {}
        self._segments: dict[tuple[int, str, str, bool], Segment] = {}
        self.trained = model.trains_tower
        first, second = self._warm(), self._warm()
        each = {kind: first[kind] - second[kind] for kind in first}
        self.working = each[""] + sum(each[kind] for kind in self._kinds)

    def _warm(self) -> dict[str, int]:
        """Bytes that are there after a layer of each kind has seen new media; "": its reading."""
        with self._bench.running() as trace, torch.no_grad():
            media, before = self._tower.sample(_WARM, META), trace.live
            x = self._tower.embed(media)
            left = {"": trace.live - before - _bytes(x)}
            for kind, layer in self._layer_by_kind.items():
                before = trace.live
                with self._model.guard(layer):
                    layer(x, media)
                left[kind] = trace.live - before
        return left

    def _sample(self, units: int) -> _MediaSample:
        if units not in self._samples:
            with self._bench.running() as trace, torch.no_grad():
                before = trace.live
                media = self._tower.sample(units, META)
                x = self._tower.embed(media)
                read = tuple(x.shape), x.dtype
                for kind in (*dict.fromkeys(self._kinds), self._kinds[-1]):
                    with self._model.guard(self._layer_by_kind[kind]):
                        y = self._layer_by_kind[kind](x, media)
                made = tuple(y.shape), y.dtype
                del x, y
                self._samples[units] = _MediaSample(media, trace.live - before, read, made)
        return self._samples[units]

    def media(self, units: int) -> Media:
        """Made-up media of about so many units."""
        return self._sample(units).media

    def media_bytes(self, units: int) -> int:
        """Bytes of media and of what all layers derive from them."""
        return self._sample(units).nbytes

    def tokens(self, units: int) -> int:
        """Embeddings that media of so many units become."""
        return len(self._sample(units).media.where)

    def cached_bytes(self, units: int) -> int:
        """Bytes of what a pack carries where the tower's outputs are known: them, and where."""
        return self.output_bytes(units) + rounded(8 * self.tokens(units))

    def output(self, units: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape ``[n, H]`` and dtype of what the tower gives."""
        return self._sample(units).output

    def output_bytes(self, units: int) -> int:
        """Bytes of what the tower gives."""
        shape, dtype = self._sample(units).output
        return rounded(shape[0] * shape[1] * dtype.itemsize)

    def segments(self, units: int, policy: str, *, graph: bool) -> list[Segment]:
        """What it reads, then each layer.

        Args:
            units: of all media.
            policy: what backward computes again, of every layer.
            graph: whether there will be a backward; without one nothing is kept.
        """
        found = [self._segment(units, "", policy, graph=graph, below=False)]
        for kind in self._kinds:
            below = bool(found[-1].backward_work)
            found.append(self._segment(units, kind, policy, graph=graph, below=below))
        return found

    def _segment(self, units: int, kind: str, policy: str, *, graph: bool, below: bool) -> Segment:
        """One of them; `below`: whether what it reads has a gradient."""
        key = (units, kind, policy if graph else "", below)
        if key not in self._segments:
            seen, model = self._sample(units), self._model
            media = seen.media.alone()

            def reads(_: list[Tensor]) -> Tensor:
                return self._tower.embed(media)

            def layer(x: list[Tensor]) -> Tensor:
                one = self._layer_by_kind[kind]
                return run_layers(
                    [one], x.pop(), media, [policy],
                    dropout=model.dropout, guards=model.guards([one]),
                )  # fmt: skip

            shape, dtype = seen.input
            with torch.set_grad_enabled(graph):
                self._segments[key] = (
                    self._bench.both(layer, shape, dtype, graph=below)
                    if kind
                    else self._bench.both(reads, (0,), dtype, graph=False)
                )
        return self._segments[key]


def _bytes(tensor: Tensor) -> int:
    return rounded(tensor.untyped_storage().nbytes())
