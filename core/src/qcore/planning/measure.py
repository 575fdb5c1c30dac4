"""Splits a training step into segments (batch, each kind of layer, loss) and measures each on meta.

This file decides the segments: the state before the first step, a batch, one layer of each kind
under each policy, and the end of the step (final norm, head, loss). A segment is run forward and
backward by the training code (`qcore.planning.runner`), so authors of blocks write no cost model.
`qcore.planning.tower` measures a tower; `qcore.planning.step` combines the segments.

Shapes: T tokens of a pack, W width of the stream between layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..api.blocks import Layer, Packed
from ..nn.model import Model
from ..nn.recompute import run_layers
from .report import Lengths
from .runner import META, Bench, signature
from .segments import Segment, affine, extrapolated, grows, smaller
from .tower import TowerMeasure
from .trace import Trace

_WARM = (64,)
AXES = 3  #: of the positions of a pack that has media: time, height and width


class Measure:
    """A model on the meta device and the measurements of its segments.

    Args:
        make: builds the model and its optimizer (`qcore.planning.meta_model`), with a trace that
            attributes allocations to ops.
        device: ``cuda`` or ``cpu``, the device that meta stands for.

    Attributes:
        model: the model on the meta device.
        layers: the layers of the trunk.
        kinds: kind of each layer; layers of one kind take the same memory and time.
        optimizer: the optimizer state.
        state_bytes: bytes of weights, adapters, their gradients and optimizer moments.
        width: W, the width of the output of the trunk's embedding.
        working: bytes that layers derive from their weights at first use and keep.
        tower: the measurements of the tower; ``None`` for a model without one.
    """

    def __init__(self, make: Callable[[Trace], tuple[Model, object]], device: str) -> None:
        self._bench = Bench(device)
        with self._running() as trace:
            self.model, self.optimizer = make(trace)
        self.state_bytes = self._bench.trace.live
        self.layers = cast("Sequence[Layer]", list(self.model.trunk.layers))
        self.kinds = [signature(cast(nn.Module, layer)) for layer in self.layers]
        self._layer_by_kind = {kind: self.layers[self.kinds.index(kind)] for kind in self.kinds}
        self._batches: dict[Any, tuple[Packed, int]] = {}
        self._derived: dict[tuple[Lengths, bool], int] = {}
        self._segments: dict[Any, Segment] = {}
        self.width = 0
        first, second = self._warm(_WARM), self._warm(_WARM)
        each = {kind: first[kind] - second[kind] for kind in self._layer_by_kind}
        self.working = sum(each[kind] for kind in self.kinds)
        has_tower = self.model.tower is not None
        self.tower = TowerMeasure(self.model, self._bench) if has_tower else None
        if self.tower is not None:
            self.working += self.tower.working

    def _running(self) -> AbstractContextManager[Trace]:
        return self._bench.running()

    def _warm(self, lengths: Lengths) -> dict[str, int]:
        """Return the bytes that a layer of each kind leaves behind after running on a new batch."""
        with self._running() as trace, torch.no_grad():
            batch, derived = _batch(lengths), {}
            for kind, layer in self._layer_by_kind.items():
                before = trace.live
                self._forward(layer, batch)
                derived[kind] = trace.live - before
        return derived

    def _forward(self, layer: Layer, batch: Packed) -> None:
        x = self.model.trunk.embed(batch)
        self.width = x.shape[1]
        with self.model.guard(layer):
            layer(x, batch.alone())

    def batch(self, lengths: Lengths, *, media: bool = False) -> int:
        """Return the bytes of a pack and of what all layers derive from it.

        Args:
            lengths: tokens of each row.
            media: whether the pack has media, so that positions have several axes; the media
                themselves are not counted (`TowerMeasure.media_bytes`).
        """
        key = (lengths, media)
        if key not in self._derived:
            if self._walked(lengths):
                along = self._along(lengths, lambda pack: self.batch(pack, media=media))
                self._derived[key] = along
            else:
                self._derived[key] = self._batch_after(
                    lengths, tuple(self._layer_by_kind), media=media
                )[1]
        return self._derived[key]

    def _batch_after(
        self, lengths: Lengths, kinds: tuple[str, ...], *, media: bool = False
    ) -> tuple[Packed, int]:
        """Return a pack on which a layer of each of `kinds` has run, and the bytes of the pack."""
        key = (lengths, kinds, media)
        if key not in self._batches:
            with self._running() as trace, torch.no_grad():
                before = trace.live
                batch = _batch(lengths, media=media)
                for kind in kinds:
                    self._forward(self._layer_by_kind[kind], batch)
                self._batches[key] = batch, trace.live - before
        return self._batches[key]

    def _walked(self, lengths: Lengths) -> bool:
        """Whether the pack is extrapolated from smaller ones because of any kind of layer."""
        return any(self.extrapolates(kind, "full", lengths) for kind in self._layer_by_kind)

    def _along(self, lengths: Lengths, count: Callable[[Lengths], int]) -> int:
        """Extrapolate `count` from smaller packs to a longer one."""
        packs = smaller(lengths)
        return affine([sum(pack) for pack in packs], [count(pack) for pack in packs], sum(lengths))

    def extrapolates(self, kind: str, policy: str, lengths: Lengths) -> bool:
        """Whether a layer is extrapolated from smaller packs: the pack is long and its ops loop."""
        packs = smaller(lengths)
        return bool(packs) and grows([self.layer(kind, policy, pack) for pack in packs[:2]])

    def embedding(self, lengths: Lengths) -> Segment:
        """Measure the embedding, the first segment; it has no backward."""
        key = ("embedding", lengths)
        if key not in self._segments:
            batch = _batch(lengths)
            with self._running() as trace:
                before = trace.live
                trace.mark()
                x = self.model.embed(batch)
                self._segments[key] = Segment(
                    kept=trace.live - before, forward=trace.peak - before, backward=0,
                    forward_work=tuple(trace.work), backward_work=(),
                )  # fmt: skip
                del x
        return self._segments[key]

    def placing(self, lengths: Lengths, units: int, *, graph: bool) -> Segment:
        """Measure the embedding of tokens and the placement of media embeddings among them.

        Args:
            lengths: tokens of each row, including placeholders for media.
            units: units of all media.
            graph: whether the output of the tower has a gradient.
        """
        key = ("placing", lengths, units, graph)
        if key not in self._segments:
            tower, model = self.require_tower(), self.model
            batch, media = _batch(lengths, media=True), tower.media(units)

            def run(x: list[Tensor]) -> Tensor:
                known = replace(media, features=x.pop(), _memo={}, _kept={})
                return model.embed(replace(batch, media=known, _memo={}, _kept={}))

            self._segments[key] = self._bench.both(run, *tower.output(units), graph=graph)
        return self._segments[key]

    def require_tower(self) -> TowerMeasure:
        """Return the tower's measurements, for a pack that has media.

        Raises:
            ValueError: the model was built without a tower.
        """
        if self.tower is None:
            raise ValueError("this model was built without a tower, and the pack has media")
        return self.tower

    def layer(self, kind: str, policy: str, lengths: Lengths) -> Segment:
        """Measure one layer.

        Args:
            kind: kind of the layer.
            policy: activation checkpointing policy; ``offload`` is measured as ``full``, because
                the meta device has no host memory.
            lengths: tokens of each row.
        """
        key = (kind, policy, lengths)
        if key not in self._segments:
            if self.extrapolates(kind, policy, lengths):
                packs = smaller(lengths)
                segments = [self.layer(kind, policy, pack) for pack in packs]
                self._segments[key] = extrapolated(
                    [sum(pack) for pack in packs], segments, sum(lengths)
                )
            else:
                self._segments[key] = self._layer(kind, policy, lengths)
        return self._segments[key]

    def _layer(self, kind: str, policy: str, lengths: Lengths) -> Segment:
        layer, model = self._layer_by_kind[kind], self.model
        # If another kind must be extrapolated, run only this kind on the pack.
        kinds = (kind,) if self._walked(lengths) else tuple(self._layer_by_kind)
        batch = self._batch_after(lengths, kinds)[0].alone()

        def run(x: list[Tensor]) -> Tensor:
            return run_layers(
                [layer], x.pop(), batch, [policy],
                dropout=model.dropout, guards=model.guards([layer]),
            )  # fmt: skip

        return self._both(run, lengths)

    def end(self, lengths: Lengths, chunk: int) -> Segment:
        """Measure final norm, head and loss, with every position supervised.

        Args:
            lengths: tokens of each row.
            chunk: positions of one chunk of the loss; 0 for all at once.
        """
        key = ("end", lengths, chunk)
        if key not in self._segments:
            packs = smaller(lengths)
            if packs and grows([self.end(pack, chunk) for pack in packs[:2]]):
                segments = [self.end(pack, chunk) for pack in packs]
                self._segments[key] = extrapolated(
                    [sum(pack) for pack in packs], segments, sum(lengths)
                )
            else:
                self._segments[key] = self._end(lengths, chunk)
        return self._segments[key]

    def _end(self, lengths: Lengths, chunk: int) -> Segment:
        model, batch = self.model, _batch(lengths)
        assert batch.targets is not None
        where, targets = batch.supervised(), batch.targets

        def run(x: list[Tensor]) -> Tensor:
            # The same as `Model.loss` after the layers.
            hidden = model.trunk.final(x.pop()).index_select(0, where)
            labels = targets.index_select(0, where)
            return model.token_loss(hidden, labels, chunk) / len(where)

        return self._both(run, lengths)

    def evaluation(self, lengths: Lengths, chunk: int) -> int:
        """Return the peak bytes of a forward to the loss without a backward.

        Args:
            lengths: tokens of each row.
            chunk: positions of one chunk of the loss; 0 for all at once.
        """
        if self._walked(lengths):
            return self._along(lengths, lambda pack: self.evaluation(pack, chunk))
        model, batch = self.model, self._batch_after(lengths, tuple(self._layer_by_kind))[0].alone()
        assert batch.targets is not None
        with self._running() as trace, torch.no_grad():
            before = trace.live
            trace.mark()
            x = model.trunk.embed(batch)
            for layer in self._layer_by_kind.values():
                with model.guard(layer):
                    x = layer(x, batch)
            where = batch.supervised()
            hidden, labels = model.trunk.final(x).index_select(0, where), batch.targets
            del x
            model.token_loss(hidden, labels.index_select(0, where), chunk)
            return trace.peak - before

    def _both(self, run: Callable[[list[Tensor]], Tensor], lengths: Lengths) -> Segment:
        return self._bench.both(run, (sum(lengths), self.width), self.model.dtype)


def _batch(lengths: Lengths, *, media: bool = False) -> Packed:
    tokens = sum(lengths)
    ids, positions, targets, where = (
        torch.empty(tokens, dtype=torch.int64, device=META) for _ in range(4)
    )
    if media:
        positions = torch.empty(AXES, tokens, dtype=torch.int64, device=META)
    return Packed(
        ids=ids,
        cu_seqlens=(0, *accumulate(lengths)),
        positions=positions,
        targets=targets,
        _memo={"supervised": where},
    )
