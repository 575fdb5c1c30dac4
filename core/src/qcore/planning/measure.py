"""Memory and work of each segment of the trunk, measured by running it once on the meta device.

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
    """A model on the meta device and what was seen of it.

    Args:
        make: builds the model (`meta.meta_model`), given what names ops.
        device: ``cuda`` or ``cpu``, which meta stands for.

    Attributes:
        model: on meta.
        kinds: of each layer; layers of one kind take the same.
        optimizer: its moments.
        state_bytes: bytes of weights, adapters, their gradients and moments.
        width: of the stream between layers, W: what the trunk's embedding returns.
        working: bytes that layers make of their weights at first use, and keep.
        tower: what a tower takes, where the model has one.
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
        has = self.model.tower is not None
        self.tower = TowerMeasure(self.model, self._bench) if has else None
        if self.tower is not None:
            self.working += self.tower.working

    def _running(self) -> AbstractContextManager[Trace]:
        return self._bench.running()

    def _warm(self, lengths: Lengths) -> dict[str, int]:
        """Bytes that are there after a layer of each kind has seen a new batch."""
        with self._running() as trace, torch.no_grad():
            batch, left = _batch(lengths), {}
            for kind, layer in self._layer_by_kind.items():
                before = trace.live
                self._forward(layer, batch)
                left[kind] = trace.live - before
        return left

    def _forward(self, layer: Layer, batch: Packed) -> None:
        x = self.model.trunk.embed(batch)
        self.width = x.shape[1]
        with self.model.guard(layer):
            layer(x, batch.alone())

    def batch(self, lengths: Lengths, *, media: bool = False) -> int:
        """Bytes of a pack of documents and of what all layers derive from it.

        Args:
            lengths: tokens of each.
            media: whether positions have several axes; the media themselves are the tower's.
        """
        key = (lengths, media)
        if key not in self._derived:
            if self._walked(lengths):
                along = self._along(lengths, lambda one: self.batch(one, media=media))
                self._derived[key] = along
            else:
                self._derived[key] = self._batch_after(
                    lengths, tuple(self._layer_by_kind), media=media
                )[1]
        return self._derived[key]

    def _batch_after(
        self, lengths: Lengths, kinds: tuple[str, ...], *, media: bool = False
    ) -> tuple[Packed, int]:
        """The pack after a layer of each of `kinds` has seen it, and its bytes."""
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
        """Whether any layer walks a pack that is too long for it."""
        return any(self.extrapolates(kind, "full", lengths) for kind in self._layer_by_kind)

    def _along(self, lengths: Lengths, count: Callable[[Lengths], int]) -> int:
        """What `count` says of smaller packs, carried on to a longer one."""
        packs = smaller(lengths)
        return affine([sum(one) for one in packs], [count(one) for one in packs], sum(lengths))

    def extrapolates(self, kind: str, policy: str, lengths: Lengths) -> bool:
        """Whether a pack is told from smaller ones: a long one of a layer that walks it."""
        packs = smaller(lengths)
        return bool(packs) and grows([self.layer(kind, policy, one) for one in packs[:2]])

    def embedding(self, lengths: Lengths) -> Segment:
        """The first segment; it has no backward."""
        key = ("embedding", lengths)
        if key not in self._segments:
            batch = _batch(lengths)
            with self._running() as trace:
                before = trace.live
                trace.mark()
                x = self.model.trunk.embed(batch)
                self._segments[key] = Segment(
                    kept=trace.live - before, forward=trace.peak - before, backward=0,
                    forward_work=tuple(trace.work), backward_work=(),
                )  # fmt: skip
                del x
        return self._segments[key]

    def placing(self, lengths: Lengths, units: int, *, graph: bool) -> Segment:
        """The embedding of tokens, and what the tower made put among them.

        Args:
            lengths: tokens of each row.
            units: of all media; their tokens are among these.
            graph: whether what the tower made has a gradient.
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
        """The tower, of a pack that has media. Raises `ValueError` where none was built."""
        if self.tower is None:
            raise ValueError("this model was built without a tower, and the pack has media")
        return self.tower

    def layer(self, kind: str, policy: str, lengths: Lengths) -> Segment:
        """One layer; under ``offload`` as under ``full``: meta has no host to park on."""
        key = (kind, policy, lengths)
        if key not in self._segments:
            if self.extrapolates(kind, policy, lengths):
                packs = smaller(lengths)
                segments = [self.layer(kind, policy, one) for one in packs]
                self._segments[key] = extrapolated(
                    [sum(one) for one in packs], segments, sum(lengths)
                )
            else:
                self._segments[key] = self._layer(kind, policy, lengths)
        return self._segments[key]

    def _layer(self, kind: str, policy: str, lengths: Lengths) -> Segment:
        layer, model = self._layer_by_kind[kind], self.model
        # A pack is not walked for one layer because another kind would.
        kinds = (kind,) if self._walked(lengths) else tuple(self._layer_by_kind)
        batch = self._batch_after(lengths, kinds)[0].alone()

        def run(x: list[Tensor]) -> Tensor:
            return run_layers(
                [layer], x.pop(), batch, [policy],
                dropout=model.dropout, guards=model.guards([layer]),
            )  # fmt: skip

        return self._both(run, lengths)

    def end(self, lengths: Lengths, chunk: int) -> Segment:
        """Final norm, head and loss, every position supervised; the head walks its chunks."""
        key = ("end", lengths, chunk)
        if key not in self._segments:
            packs = smaller(lengths)
            if packs and grows([self.end(one, chunk) for one in packs[:2]]):
                segments = [self.end(one, chunk) for one in packs]
                self._segments[key] = extrapolated(
                    [sum(one) for one in packs], segments, sum(lengths)
                )
            else:
                self._segments[key] = self._end(lengths, chunk)
        return self._segments[key]

    def _end(self, lengths: Lengths, chunk: int) -> Segment:
        model, batch = self.model, _batch(lengths)
        assert batch.targets is not None
        where, targets = batch.supervised(), batch.targets

        def run(x: list[Tensor]) -> Tensor:
            # As `Model.loss`, behind the layers.
            hidden = model.trunk.final(x.pop()).index_select(0, where)
            wanted = targets.index_select(0, where)
            loss = model._cross_entropy(hidden, model.head, wanted, chunk or None)
            return loss / len(where)

        return self._both(run, lengths)

    def evaluation(self, lengths: Lengths, chunk: int) -> int:
        """The most that a forward to the loss takes where nothing is kept for a backward."""
        if self._walked(lengths):
            return self._along(lengths, lambda one: self.evaluation(one, chunk))
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
            hidden, wanted = model.trunk.final(x).index_select(0, where), batch.targets
            del x
            model._cross_entropy(hidden, model.head, wanted.index_select(0, where), chunk or None)
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
