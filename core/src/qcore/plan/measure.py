"""What each piece of a step takes, seen by running it once on the meta device.

This file decides the pieces: what is there before the first step, what a batch carries, one
layer of each kind under each policy, and the end of the step (final norm, head, loss). A piece
is run forwards and backwards by the code that trains, and its input is handed over as its
neighbour would, so authors of blocks write no cost model. `planner` puts the pieces together.

Shapes: T tokens of a pack, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..model import Model
from ..nn.adapted import Adapted
from ..nn.again import run_layers
from ..nn.launch import Planned, planning
from ..nn.protocols import Layer, Packed
from .pieces import Piece, affine, grows, smaller, stretched
from .record import Lengths
from .trace import Trace

_META = torch.device("meta")
_WARM = (64,)


class Measure:
    """A model on the meta device and what was seen of it.

    Args:
        make: builds the model (`meta.meta_model`), given what names ops.
        device: ``cuda`` or ``cpu``, which meta stands for.

    Attributes:
        model: on meta.
        kinds: of each layer; layers of one kind take the same.
        optimizer: its moments.
        held: bytes of weights, adapters, their gradients and moments.
        working: bytes that layers make of their weights at first use, and keep.
    """

    def __init__(self, make: Callable[[Trace], tuple[Model, object]], device: str) -> None:
        self._trace = Trace("meta")
        self._planned = Planned(device=device, told=self._trace.told)
        with self._running():
            self.model, self.optimizer = make(self._trace)
        self.held = self._trace.live
        self.layers = cast("Sequence[Layer]", list(self.model.trunk.layers))
        self.kinds = [_signature(layer) for layer in self.layers]
        self._one = {kind: self.layers[self.kinds.index(kind)] for kind in self.kinds}
        self._batches: dict[Any, tuple[Packed, int]] = {}
        self._derived: dict[Lengths, int] = {}
        self._pieces: dict[Any, Piece] = {}
        first, second = self._warm(_WARM), self._warm(_WARM)
        each = {kind: first[kind] - second[kind] for kind in self._one}
        self.working = sum(each[kind] for kind in self.kinds)

    @contextmanager
    def _running(self) -> Iterator[Trace]:
        with planning(self._planned), self._trace:
            yield self._trace

    def _warm(self, lengths: Lengths) -> dict[str, int]:
        """Bytes that are there after a layer of each kind has seen a new batch."""
        with self._running() as trace, torch.no_grad():
            batch, left = _batch(lengths), {}
            for kind, layer in self._one.items():
                before = trace.live
                self._forward(layer, batch)
                left[kind] = trace.live - before
        return left

    def _forward(self, layer: Layer, batch: Packed) -> None:
        layer(self.model.trunk.embed(batch), batch.alone())

    def batch(self, lengths: Lengths) -> int:
        """Bytes of a pack of documents and of what all layers derive from it."""
        if lengths not in self._derived:
            if self._walked(lengths):
                self._derived[lengths] = self._along(lengths, self.batch)
            else:
                self._derived[lengths] = self._seen(lengths, tuple(self._one))[1]
        return self._derived[lengths]

    def _seen(self, lengths: Lengths, kinds: tuple[str, ...]) -> tuple[Packed, int]:
        """The pack after a layer of each of `kinds` has seen it, and its bytes."""
        key = (lengths, kinds)
        if key not in self._batches:
            with self._running() as trace, torch.no_grad():
                before = trace.live
                batch = _batch(lengths)
                for kind in kinds:
                    self._forward(self._one[kind], batch)
                self._batches[key] = batch, trace.live - before
        return self._batches[key]

    def _walked(self, lengths: Lengths) -> bool:
        """Whether any layer walks a pack that is too long for it."""
        return any(self.stretches(kind, "full", lengths) for kind in self._one)

    def _along(self, lengths: Lengths, count: Callable[[Lengths], int]) -> int:
        """What `count` says of smaller packs, carried on to a longer one."""
        packs = smaller(lengths)
        return affine([sum(one) for one in packs], [count(one) for one in packs], sum(lengths))

    def stretches(self, kind: str, policy: str, lengths: Lengths) -> bool:
        """Whether a pack is told from smaller ones: a long one of a layer that walks it."""
        packs = smaller(lengths)
        return bool(packs) and grows([self.layer(kind, policy, one) for one in packs[:2]])

    def embedding(self, lengths: Lengths) -> Piece:
        """The first piece; it has no backward."""
        key = ("embedding", lengths)
        if key not in self._pieces:
            batch = _batch(lengths)
            with self._running() as trace:
                before = trace.live
                trace.mark()
                x = self.model.trunk.embed(batch)
                self._pieces[key] = Piece(
                    kept=trace.live - before, forward=trace.peak - before, backward=0,
                    forth=tuple(trace.work), back=(),
                )  # fmt: skip
                del x
        return self._pieces[key]

    def layer(self, kind: str, policy: str, lengths: Lengths) -> Piece:
        """One layer; under ``offload`` as under ``full``: meta has no host to park on."""
        key = (kind, policy, lengths)
        if key not in self._pieces:
            if self.stretches(kind, policy, lengths):
                packs = smaller(lengths)
                pieces = [self.layer(kind, policy, one) for one in packs]
                self._pieces[key] = stretched([sum(one) for one in packs], pieces, sum(lengths))
            else:
                self._pieces[key] = self._layer(kind, policy, lengths)
        return self._pieces[key]

    def _layer(self, kind: str, policy: str, lengths: Lengths) -> Piece:
        layer, model = self._one[kind], self.model
        # A pack is not walked for one layer because another kind would.
        kinds = (kind,) if self._walked(lengths) else tuple(self._one)
        batch = self._seen(lengths, kinds)[0].alone()

        def run(x: list[Tensor]) -> Tensor:
            return run_layers([layer], x.pop(), batch, [policy], dropout=model.dropout)

        return self._both(run, lengths)

    def end(self, lengths: Lengths, chunk: int) -> Piece:
        """Final norm, head and loss, every position supervised; the head walks its chunks."""
        key = ("end", lengths, chunk)
        if key not in self._pieces:
            packs = smaller(lengths)
            if packs and grows([self.end(one, chunk) for one in packs[:2]]):
                pieces = [self.end(one, chunk) for one in packs]
                self._pieces[key] = stretched([sum(one) for one in packs], pieces, sum(lengths))
            else:
                self._pieces[key] = self._end(lengths, chunk)
        return self._pieces[key]

    def _end(self, lengths: Lengths, chunk: int) -> Piece:
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
        model, batch = self.model, self._seen(lengths, tuple(self._one))[0].alone()
        assert batch.targets is not None
        with self._running() as trace, torch.no_grad():
            before = trace.live
            trace.mark()
            x = model.trunk.embed(batch)
            for layer in self._one.values():
                x = layer(x, batch)
            where = batch.supervised()
            hidden, wanted = model.trunk.final(x).index_select(0, where), batch.targets
            del x
            model._cross_entropy(hidden, model.head, wanted.index_select(0, where), chunk or None)
            return trace.peak - before

    def _both(self, run: Callable[[list[Tensor]], Tensor], lengths: Lengths) -> Piece:
        """`run` forwards and backwards; it pops its input off a list, so that nobody holds it."""
        with self._running() as trace:
            spark = torch.empty(0, device=_META, requires_grad=True)
            shape = (sum(lengths), self.model.head.shape[1])
            x = [_Source.apply(spark, shape, self.model.dtype)]  # type: ignore[no-untyped-call]
            before, by = trace.live, trace.by.copy()
            trace.mark()
            y = run(x)
            kept, forward, forth = trace.live - before, trace.peak - before, tuple(trace.work)
            forward_by = _more(trace.peak_by, by)
            last = _Sink.apply(y)  # type: ignore[no-untyped-call]
            del y
            trace.mark()
            torch.autograd.backward(last)
            made = Piece(
                kept=kept, forward=forward, backward=trace.peak - before, forth=forth,
                back=tuple(trace.work), forward_by=forward_by,
                backward_by=_more(trace.peak_by, by),
            )  # fmt: skip
        return made


def _more(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {op: n - before.get(op, 0) for op, n in now.items() if op and n > before.get(op, 0)}


class _Source(torch.autograd.Function):
    """What a layer reads: given up as soon as nobody saved it, unlike a leaf."""

    @staticmethod
    def forward(ctx: Any, spark: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=_META)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
        return dx.new_empty(0), None, None


class _Sink(torch.autograd.Function):
    """What comes after: it holds nothing, and its backward makes a gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return torch.empty((), device=_META)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.empty(ctx.shape, dtype=ctx.dtype, device=_META)


def _batch(lengths: Lengths) -> Packed:
    tokens = sum(lengths)
    ids, positions, targets, where = (
        torch.empty(tokens, dtype=torch.int64, device=_META) for _ in range(4)
    )
    return Packed(
        ids=ids,
        cu_seqlens=(0, *accumulate(lengths)),
        positions=positions,
        targets=targets,
        _memo={"supervised": where},
    )


def _signature(layer: Layer) -> str:
    """Equal for layers that are made of the same modules with the same numbers."""
    parts = []
    for name, module in cast(nn.Module, layer).named_modules():
        tensors = [
            (leaf, tuple(one.shape), one.dtype, one.requires_grad)
            for leaf, one in module.named_parameters(recurse=False)
        ]
        numbers = [
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, int | float | tuple)
        ]
        lora = module.lora if isinstance(module, Adapted) else None
        parts.append((name, type(module).__qualname__, tensors, numbers, lora))
    return repr(parts)
