"""What each piece of a step takes, seen by running it once on the meta device.

This file decides the pieces: what is there before the first step, what a batch carries, one
layer of each kind under each policy, and the end of the step (final norm, head, loss). A piece
is run forwards and backwards by the code that trains, and its input is handed over as its
neighbour would, so authors of blocks write no cost model. `plan` puts the pieces together.

Shapes: T tokens of a pack, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from .model import Model
from .nn.adapted import Adapted
from .nn.again import run_layers
from .nn.launch import Planned, planning
from .nn.protocols import Layer, Packed
from .plan_trace import Trace, Work

_META = torch.device("meta")
_WARM = (64,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes over what lay there before, the input included, and the work.

    Attributes:
        kept: after the forward; the input is given up where nobody saved it.
        forward: the most during the forward.
        backward: the most during the backward.
        forth: what the forward does.
        back: what the backward does.
        forward_by: what of `forward` is whose, by op.
        backward_by: the same of `backward`.
    """

    kept: int
    forward: int
    backward: int
    forth: tuple[Work, ...]
    back: tuple[Work, ...]
    forward_by: Mapping[str, int] = field(default_factory=dict)
    backward_by: Mapping[str, int] = field(default_factory=dict)


class Measure:
    """A model on the meta device and what was seen of it.

    Args:
        make: builds the model (`plan_model.meta_model`), given what names ops.
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
        self._batches: dict[tuple[int, ...], tuple[Packed, int]] = {}
        self._pieces: dict[Any, Piece] = {}
        first, second = self._warm(_WARM), self._warm(_WARM)
        each = {kind: first[kind] - second[kind] for kind in self._one}
        self.working = sum(each[kind] for kind in self.kinds)

    @contextmanager
    def _running(self) -> Iterator[Trace]:
        with planning(self._planned), self._trace:
            yield self._trace

    def _warm(self, lengths: tuple[int, ...]) -> dict[str, int]:
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

    def batch(self, lengths: tuple[int, ...]) -> tuple[Packed, int]:
        """A pack of documents, and the bytes of it and of what all layers derive from it."""
        if lengths not in self._batches:
            with self._running() as trace, torch.no_grad():
                before = trace.live
                batch = _batch(lengths)
                for layer in self._one.values():
                    self._forward(layer, batch)
                self._batches[lengths] = batch, trace.live - before
        return self._batches[lengths]

    def embedding(self, lengths: tuple[int, ...]) -> Piece:
        """The first piece; it has no backward."""
        key = ("embedding", lengths)
        if key not in self._pieces:
            batch, _ = self.batch(lengths)
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

    def layer(self, kind: str, policy: str, lengths: tuple[int, ...]) -> Piece:
        """One layer; under ``offload`` as under ``full``: meta has no host to park on."""
        key = (kind, policy, lengths)
        if key not in self._pieces:
            layer, model = self._one[kind], self.model
            batch = self.batch(lengths)[0].alone()

            def run(x: list[Tensor]) -> Tensor:
                return run_layers([layer], x.pop(), batch, [policy], dropout=model.dropout)

            self._pieces[key] = self._both(run, lengths)
        return self._pieces[key]

    def end(self, lengths: tuple[int, ...], chunk: int) -> Piece:
        """Final norm, head and loss, every position supervised."""
        key = ("end", lengths, chunk)
        if key not in self._pieces:
            model, batch = self.model, self.batch(lengths)[0]
            assert batch.targets is not None
            where, targets = batch.supervised(), batch.targets

            def run(x: list[Tensor]) -> Tensor:
                # As `Model.loss`, behind the layers.
                hidden = model.trunk.final(x.pop()).index_select(0, where)
                wanted = targets.index_select(0, where)
                loss = model._cross_entropy(hidden, model.head, wanted, chunk or None)
                return loss / len(where)

            self._pieces[key] = self._both(run, lengths)
        return self._pieces[key]

    def evaluation(self, lengths: tuple[int, ...], chunk: int) -> int:
        """The most that a forward to the loss takes where nothing is kept for a backward."""
        model, batch = self.model, self.batch(lengths)[0].alone()
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

    def _both(self, run: Callable[[list[Tensor]], Tensor], lengths: tuple[int, ...]) -> Piece:
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


def _batch(lengths: tuple[int, ...]) -> Packed:
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
