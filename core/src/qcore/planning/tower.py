"""Measures a vision tower's memory, FLOPs and bytes moved by running it once on the meta device.

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
    """Sample media on which a layer of each kind has run.

    Attributes:
        media: the media, with all that layers derive from them.
        nbytes: bytes of the media, with all that layers derive from them.
        input: shape ``[U, D]`` and dtype of the input of a layer.
        output: shape ``[n, H]`` and dtype of the output of the last layer.
    """

    media: Media
    nbytes: int
    input: tuple[tuple[int, ...], torch.dtype]
    output: tuple[tuple[int, ...], torch.dtype]


class TowerMeasure:
    """The tower of a model on the meta device and the measurements of its segments.

    Args:
        model: a model with a tower, on the meta device.
        bench: runs the segments.

    Attributes:
        trained: whether the tower has a backward.
        working: bytes that the tower derives from its weights at first use and keeps.
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
        """Return the bytes that a layer of each kind, and the embedding (""), leaves behind."""
        with self._bench.running() as trace, torch.no_grad():
            media, before = self._tower.sample(_WARM, META), trace.live
            x = self._tower.embed(media)
            derived = {"": trace.live - before - _bytes(x)}
            for kind, layer in self._layer_by_kind.items():
                before = trace.live
                with self._model.guard(layer):
                    layer(x, media)
                derived[kind] = trace.live - before
        return derived

    def _sample(self, units: int) -> _MediaSample:
        if units not in self._samples:
            with self._bench.running() as trace, torch.no_grad():
                before = trace.live
                media = self._tower.sample(units, META)
                x = self._tower.embed(media)
                input_meta = tuple(x.shape), x.dtype
                for kind in (*dict.fromkeys(self._kinds), self._kinds[-1]):
                    with self._model.guard(self._layer_by_kind[kind]):
                        y = self._layer_by_kind[kind](x, media)
                output_meta = tuple(y.shape), y.dtype
                del x, y
                self._samples[units] = _MediaSample(
                    media, trace.live - before, input_meta, output_meta
                )
        return self._samples[units]

    def media(self, units: int) -> Media:
        """Return sample media of about `units` units."""
        return self._sample(units).media

    def media_bytes(self, units: int) -> int:
        """Return the bytes of media and of what all layers derive from them."""
        return self._sample(units).nbytes

    def tokens(self, units: int) -> int:
        """Return the number of embeddings that `units` units of media become."""
        return len(self._sample(units).media.where)

    def cached_bytes(self, units: int) -> int:
        """Return the bytes of cached outputs in a pack, with their positions."""
        return self.output_bytes(units) + rounded(8 * self.tokens(units))

    def output(self, units: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape ``[n, H]`` and dtype of the tower's output."""
        return self._sample(units).output

    def output_bytes(self, units: int) -> int:
        """Return the bytes of the tower's output."""
        shape, dtype = self._sample(units).output
        return rounded(shape[0] * shape[1] * dtype.itemsize)

    def segments(self, units: int, policy: str, *, graph: bool) -> list[Segment]:
        """Measure the embedding of media, then each layer.

        Args:
            units: units of all media.
            policy: activation checkpointing policy of every layer.
            graph: whether there is a backward; without one nothing is saved.

        Returns:
            The segment of the embedding, then one for each layer.
        """
        segments = [self._segment(units, "", policy, graph=graph, below=False)]
        for kind in self._kinds:
            below = bool(segments[-1].backward_work)
            segments.append(self._segment(units, kind, policy, graph=graph, below=below))
        return segments

    def _segment(self, units: int, kind: str, policy: str, *, graph: bool, below: bool) -> Segment:
        """Measure one segment; `below` says whether its input requires a gradient."""
        key = (units, kind, policy if graph else "", below)
        if key not in self._segments:
            sample, model = self._sample(units), self._model
            media = sample.media.alone()

            def embed(_: list[Tensor]) -> Tensor:
                return self._tower.embed(media)

            def layer(x: list[Tensor]) -> Tensor:
                module = self._layer_by_kind[kind]
                return run_layers(
                    [module], x.pop(), media, [policy],
                    dropout=model.dropout, guards=model.guards([module]),
                )  # fmt: skip

            shape, dtype = sample.input
            with torch.set_grad_enabled(graph):
                self._segments[key] = (
                    self._bench.both(layer, shape, dtype, graph=below)
                    if kind
                    else self._bench.both(embed, (0,), dtype, graph=False)
                )
        return self._segments[key]


def _bytes(tensor: Tensor) -> int:
    return rounded(tensor.untyped_storage().nbytes())
