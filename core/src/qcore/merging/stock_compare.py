"""Runs our layers beside those of a stock model, on the same inputs, and bounds the difference.

This file decides how far outputs may differ. Both sides compute in float32, and the bound is
measured: the stock layer also runs with its sums in another order (`OtherOrder`), and, where our
side holds weights that were merged and rounded, with its adapter merged and rounded to the same
dtype. A layer of ours may differ from the stock layer, on the stock layer's own input, by `SHARE`
times what that changes in most tokens, plus `OWN` times what it changes in the token. Tokens that a
router sends to other experts when the input changes by that much are counted and not compared, and
widen no bound; a layer without any other token is named. Values that are not finite are a
difference. Each side also runs on its own outputs to the logits.

Shapes: N documents, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..api.blocks import Packed
from .layer_stream import LayerStream
from .routes import moved, routes
from .stock_model import Call, OtherOrder, StockModel

#: Allowed multiple of what another order of the sums changes: ours has other kernels, and a sum
#: over many terms varies by that much. With rounded weights both sides round the same sums.
SHARE, SHARE_ROUNDED = 16.0, 4.0
OWN = 3.0
_FLOOR = 2e-6  # share of the largest output: where another order changes nothing by chance
_LAST = 8  # positions of each prompt, the last ones, whose logits are compared
_JITTER, _JITTER_ROUNDED = 3e-6, 6e-3  # relative change of the input that shows unstable routes


@dataclass(slots=True)
class Pass:
    """Both sides on the same prompts.

    Attributes:
        stock: logits ``[n, V]`` of the last positions of each document.
        ours: those of our side.
        bounds: how far they may differ, by document.
        rerouted: documents in which our own stream took another expert.
        worst: the largest difference of a layer, as a share of what is allowed.
        layer: the layer of `worst`.
        difference: the difference there.
        allowed: what is allowed there.
        unstable: tokens that were not compared in a layer.
        skipped: layers in which no token was compared.
    """

    stock: list[Tensor] = field(default_factory=list)
    ours: list[Tensor] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    rerouted: list[bool] = field(default_factory=list)
    worst: float = 0.0
    layer: str = ""
    difference: float = 0.0
    allowed: float = 0.0
    unstable: int = 0
    skipped: list[str] = field(default_factory=list)

    def judge(self, name: str, off: Tensor, allowed: Tensor, skip: Tensor | None = None) -> None:
        """Keep the largest difference of a layer as a share of what is allowed.

        Args:
            name: of the layer.
            off: largest difference of each token ``[T]``.
            allowed: what is allowed of each token ``[T]``.
            skip: tokens ``[T]`` that are not compared.
        """
        if skip is not None:
            if bool(skip.all()):
                self.skipped.append(name)
            off = off.masked_fill(skip, 0)
        # NaN compares as false: it is as far off as can be, and allows nothing.
        off, allowed = off.nan_to_num(nan=torch.inf), allowed.nan_to_num(nan=0.0)
        at = int((off / allowed.clamp_min(1e-30)).argmax())
        share = float(off[at] / allowed[at].clamp_min(1e-30))
        if share > self.worst:
            self.worst, self.layer = share, name
            self.difference, self.allowed = float(off[at]), float(allowed[at])


class _Lockstep:
    """What follows the stock model's forward pass layer by layer."""

    def __init__(
        self, ours: LayerStream, docs: Sequence[Tensor], adapted: bool, rounded: torch.dtype | None
    ) -> None:
        self.ours, self.adapted, self.rounded = ours, adapted, rounded
        self.batch = Packed.of(list(docs))
        longest = max(len(ids) for ids in docs)
        self.there = torch.stack([torch.arange(longest) < len(ids) for ids in docs])
        self.x = ours.embed(self.batch, adapted=adapted)
        self.other: Tensor | None = None
        self.result = Pass()
        self.moved = torch.zeros(len(self.batch.ids), dtype=torch.bool)
        self._noise = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def observe(self, call: Call) -> None:
        """Compare a layer, and move our stream and the reordered stream through it."""
        x, out = call.x[self.there], call.out[self.there]
        if self.other is None:
            exact = torch.zeros(len(x)) + x.abs().max() * _FLOOR
            self.result.judge("embed", (self.x - x).abs().amax(1), exact)
            self.other = call.x
        with rounding(call.layer, self.rounded), OtherOrder():
            same = call.again(call.x)[self.there]
            self.other = call.again(self.other)
        noise = (same - out).abs().amax(1)
        with self.ours.layer(call.number, adapted=self.adapted) as layer:
            with routes(layer) as picked:
                mine = layer(x, self.batch)
            with routes(layer) as own:
                self.x = layer(self.x, self.batch)
            unstable = self._unstable(layer, x, picked)
        went = moved(picked, own)
        if unstable is not None and went is not None:
            self.moved |= went | unstable
            self.result.unstable += int(unstable.sum())
        name = self.ours.layers[call.number]
        allowed = self._allowed(noise, unstable) + _FLOOR * out.abs().max()
        self.result.judge(name, (mine - out).abs().amax(1), allowed, unstable)

    def _allowed(self, noise: Tensor, unstable: Tensor | None) -> Tensor:
        """How far each token may be off ``[T]``, by what another order of the sums changes."""
        share = SHARE if self.rounded is None else SHARE_ROUNDED
        compared = noise if unstable is None or bool(unstable.all()) else noise[~unstable]
        return share * compared.quantile(0.75) + OWN * noise

    def _unstable(self, layer: nn.Module, x: Tensor, picked: list[Tensor]) -> Tensor | None:
        """Tokens ``[T]`` whose experts depend on rounding; ``None`` without experts."""
        unstable: Tensor | None = None
        size = _JITTER if self.rounded is None else _JITTER_ROUNDED
        for _ in range(3 if picked else 0):
            jitter = torch.randn(x.shape, generator=self._noise)
            with routes(layer) as again:
                layer(x * (1 + size * jitter), self.batch)
            changed = moved(picked, again)
            unstable = changed if unstable is None or changed is None else unstable | changed
        return unstable


@torch.no_grad()
def lockstep(
    stock: StockModel,
    ours: LayerStream,
    docs: Sequence[Tensor],
    *,
    stock_adapted: bool = True,
    ours_adapted: bool = True,
    rounded: torch.dtype | None = None,
) -> Pass:
    """Run both sides on documents.

    Args:
        stock: the stock model.
        ours: ours.
        docs: token ids ``[T]`` of each document.
        stock_adapted: with the adapter, where the stock model has one.
        ours_adapted: with ours.
        rounded: our side holds merged weights of this dtype, which the stock model computes from
            base and adapter.
    """
    follow = _Lockstep(ours, docs, ours_adapted, rounded)
    ids = torch.nn.utils.rnn.pad_sequence(list(docs), batch_first=True)
    with stock.adapted(stock_adapted):
        hidden = stock.run(ids, follow.observe)
        assert follow.other is not None
        other = stock.norm(follow.other)
        rows = torch.cat([_last(hidden[n], len(d)) for n, d in enumerate(docs)])
        rows_other = torch.cat([_last(other[n], len(d)) for n, d in enumerate(docs)])
        logits = stock.head(torch.cat([rows, rows_other]))
    counts = [min(_LAST, len(ids)) for ids in docs]
    theirs, again = (half.split(counts) for half in logits.chunk(2))
    lengths = [len(ids) for ids in docs]
    final = ours.final(follow.x, adapted=ours_adapted).split(lengths)
    own = ours.head(torch.cat([x[-_LAST:] for x in final]), adapted=ours_adapted).split(counts)
    result = follow.result
    share = SHARE if rounded is None else SHARE_ROUNDED
    for mine, them, twice, gone in zip(
        own, theirs, again, follow.moved.split(lengths), strict=True
    ):
        noise = float((twice - them).abs().max())
        result.stock.append(them)
        result.ours.append(mine)
        result.bounds.append(share * noise + _FLOOR * float(them.abs().max()))
        result.rerouted.append(bool(gone.any()))
    return result


def _last(x: Tensor, length: int) -> Tensor:
    """The last rows of a padded document ``[T, H]``."""
    return x[max(0, length - _LAST) : length]


@contextmanager
def rounding(layer: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Merge the adapter of a stock layer into its weights, rounded; undo it at the end."""
    modules: list[Any] = [
        m for m in layer.modules() if hasattr(m, "merge") and hasattr(m, "base_layer")
    ]
    if dtype is None or not modules:
        yield
        return
    own: dict[int, nn.Parameter] = {
        id(p): p for m in modules for n, p in m.base_layer.named_parameters() if "lora_" not in n
    }
    before = {key: parameter.data.clone() for key, parameter in own.items()}
    for module in modules:
        module.merge()
    for parameter in own.values():
        parameter.data.copy_(parameter.data.to(dtype).float())
    yield
    for module in modules:
        module.unmerge()
    for key, parameter in own.items():
        parameter.data.copy_(before[key])
