"""Protocols of the torch modules that a plugin builds: trunk, layers, tower, and their batch.

This file decides what core requires of a trunk and of a tower, and what it offers to blocks that
are built. Core owns the loop over layers (activation checkpointing and offload are there, once),
the head and the loss; a plugin owns the blocks. Parameter names inside a trunk are the table's
names without `Architecture.root`. The functions that blocks call are in `qcore.ops`.

Shapes: T tokens of all documents in the pack, N documents, H hidden size (what the head reads),
W width of the residual stream between layers (usually W = H); U units of media (what a tower
computes), F numbers of each, D the tower's width, n embeddings that they become; R rows that are
routed to experts, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

_V = TypeVar("_V")
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(slots=True)
class Shared:
    """What layers derive from their batch once, and what they leave in it."""

    _memo: dict[str, Any] = field(default_factory=dict, repr=False, kw_only=True)
    _kept: dict[str, Any] = field(default_factory=dict, repr=False, kw_only=True)

    def keep(self, key: str, value: Any) -> None:
        """Leave something of a layer for `Trunk.aux_loss`; the first value of a key stays.

        A layer that runs again in backward says the same thing twice.
        """
        self._kept.setdefault(key, value)

    def kept(self) -> Mapping[str, Any]:
        """What the layers left, by key."""
        return self._kept

    def replace_kept(self, values: Mapping[str, Any]) -> None:
        """Put the same things, now with a gradient, in place of what a layer left."""
        self._kept.update(values)

    def alone(self) -> Self:
        """The same batch for a layer that runs again: what was derived is shared, nothing kept."""
        return replace(self, _memo=self._memo, _kept={})

    def memo(self, key: str, make: Callable[[], _V]) -> _V:
        """What all layers derive from the batch alone, made once (rotary tables, indices)."""
        if key not in self._memo:
            self._memo[key] = make()
        value: _V = self._memo[key]
        return value


@dataclass(slots=True)
class Media(Shared):
    """What a tower reads of one pack; a plugin's reader may add fields.

    Attributes:
        values: ``[U, F]``, the units of all media one after another.
        grids: how the units of each medium lie; their meaning is the plugin's.
        where: ``[n]`` int64, the tokens of the pack whose embeddings the tower's outputs are.
        features: ``[n, W]``, the outputs, if they are known already.
    """

    values: Tensor
    grids: tuple[tuple[int, ...], ...]
    where: Tensor
    features: Tensor | None = None

    def to(self, device: torch.device) -> Self:
        """The same on another device; what was derived from it stays behind."""
        moved: dict[str, Any] = {
            one.name: value.to(device, non_blocking=True)
            for one in fields(self)
            if isinstance(value := getattr(self, one.name), Tensor)
        }
        return replace(self, **moved, _memo={}, _kept={})


@dataclass(slots=True)
class Packed(Shared):
    """Documents laid end to end: no padding, state reset at every boundary.

    Attributes:
        ids: ``[T]`` int64 token ids.
        cu_seqlens: ``[N + 1]`` cumulative lengths, starting at 0 and ending at T; kept as
            Python integers because every block loops or indexes by them on the host.
        positions: ``[T]`` int64, or ``[axes, T]`` for multi-axis rotary positions.
        targets: ``[T]`` int64, the id that each position predicts, -100 where unsupervised;
            ``None`` when nothing is trained.
        media: what a tower reads of it; ``None`` where it is text alone.
    """

    ids: Tensor
    cu_seqlens: tuple[int, ...]
    positions: Tensor
    targets: Tensor | None = None
    media: Media | None = None

    @staticmethod
    def of(documents: Sequence[Tensor], targets: Sequence[Tensor] | None = None) -> Packed:
        """Pack token ids ``[t_i]`` (and targets of the same lengths), positions from 0 each."""
        ends = [0]
        for document in documents:
            ends.append(ends[-1] + len(document))
        return Packed(
            ids=torch.cat(list(documents)),
            cu_seqlens=tuple(ends),
            positions=torch.cat([torch.arange(len(d), device=d.device) for d in documents]),
            targets=None if targets is None else torch.cat(list(targets)),
        )

    def supervised(self) -> Tensor:
        """``[S]`` int64: the positions that have a target."""

        def find() -> Tensor:
            assert self.targets is not None
            return (self.targets >= 0).nonzero().squeeze(1)

        return self.memo("supervised", find)

    def to(self, device: torch.device) -> Packed:
        """The same batch on another device; what was derived from it stays behind."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        media = None if self.media is None else self.media.to(device)
        if self.targets is None:
            ids, positions = move(self.ids), move(self.positions)
            return replace(self, ids=ids, positions=positions, media=media, _memo={}, _kept={})
        # Counted here, where the ids still are on the host: on a GPU it would wait for the forward.
        return replace(
            self,
            ids=move(self.ids),
            positions=move(self.positions),
            targets=move(self.targets),
            media=media,
            _memo={"supervised": move(self.supervised())},
            _kept={},
        )


class LinearLayer(Protocol):
    """A linear map with whatever storage and LoRA core gave it; an ``nn.Module``.

    Attributes:
        weight: ``[out, in]``, frozen; ``None`` while it is held in 4 bit.
    """

    weight: nn.Parameter | None

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., out]``, without a bias."""
        ...

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Put a tensor beside the weight, such as a bias that the caller adds."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter of the module by its name."""
        ...


class RowRouting(Protocol):
    """The order of R rows when they are sorted by expert; make one with `qcore.ops.Routing.of`.

    Attributes:
        order: ``[R]`` int64, the flat place (token, choice) of each sorted row.
        inverse: ``[R]`` int64, the sorted row of each flat place.
        ends: ``[E]`` int32, where each expert's rows end.
        k: experts of a token, ``R = T k``.
    """

    order: Tensor
    inverse: Tensor
    ends: Tensor
    k: int


class ExpertsLayer(Protocol):
    """One linear map per expert, with whatever storage and LoRA core gave it; an ``nn.Module``."""

    def __call__(
        self, x: Tensor, routing: RowRouting, tokens: Literal["in", "out"] | None = None
    ) -> Tensor:
        """Apply to each row the map of the expert that it is routed to.

        Args:
            x: ``[R, in]``, rows sorted by expert; with ``tokens="in"`` tokens ``[T, in]``, each of
                which goes to its k experts.
            routing: a `qcore.ops.Routing`.
            tokens: ``None`` maps rows to rows. ``"in"`` reads tokens in place of rows, and saves
                these for backward. ``"out"`` returns the sum of each token's k rows.

        Returns:
            ``[R, out]``; with ``tokens="out"`` ``[T, out]``.
        """
        ...


class BuildContext(Protocol):
    """What blocks are built from: core decides on storage, adapter and device.

    Every module and tensor is created on the meta device with the table's shape; core loads the
    weights later. Names are relative to `Architecture.root` (of a tower: `Modality.root`).

    Attributes:
        config: config.json, whole.
        dtype: dtype of activations.
    """

    config: Mapping[str, Any]
    dtype: torch.dtype

    def linear(self, name: str) -> LinearLayer:
        """A linear map ``[..., in] -> [..., out]`` for the row ``{name}.weight``."""
        ...

    def experts(self, name: str) -> ExpertsLayer:
        """One linear map per expert, for the row `name` ``[E, out, in]``."""
        ...

    def stack(self, *linears: LinearLayer) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """Maps that read the same x, as one: ``[..., in] -> ([..., out], ...)``, in their order.

        Args:
            linears: what `linear` returned; they stay the caller's modules, under their own names.
        """
        ...

    def tensor(self, name: str) -> nn.Parameter:
        """A frozen parameter for the row `name`, e.g. a norm's weight."""
        ...

    def kernel(self, op: str, reference: _F) -> _F:
        """The backend that the run chose for an op.

        Args:
            op: full name, ``acme::rms_norm`` (`qcore.api.records.Op`).
            reference: the op in torch, returned if the run chose no other backend. A backend has
                its signature.
        """
        ...


@runtime_checkable
class DecodeCache(Protocol):
    """The state of one layer while one document is decoded, advanced in place by the layer.

    A decoder calls `Layer.new_cache` once, then for each document `reset`, the layer on the
    prompt ``[T, W]``, and the layer on one token ``[1, W]`` after another. On a GPU the second of
    these is captured in a CUDA graph and replayed. Before that it calls `hold`; from then on the
    layer must neither allocate state, nor read a tensor's value on the host, nor depend on a
    number that the host counts. A cache whose size does not depend on the number of tokens (a
    recurrent state) has nothing to do in `hold`.
    """

    def reset(self) -> None:
        """Begin another document in the same tensors, which `hold` does not bind any more."""
        ...

    def hold(self, at: Tensor, span: int) -> None:
        """Prepare for calls that bring one token each; called again when the span grows.

        Args:
            at: ``[1]`` int64 on the device: how many tokens the document has before this one. The
                decoder advances it in place, after each token; read it in each call.
            span: how many tokens of the cache are read, at least those before and this one.
        """
        ...


@runtime_checkable
class Layer(Protocol):
    """One residual layer of a trunk; an ``nn.Module``.

    Core may run it again in backward, so the same x and batch must give the same numbers.
    """

    def __call__(self, x: Tensor, batch: Packed, cache: DecodeCache | None = None) -> Tensor:
        """``[T, W] -> [T, W]``.

        Args:
            x: the residual stream of all documents.
            batch: the pack. With a cache, the next tokens of one document.
            cache: what `new_cache` returned, advanced in place; ``None`` in training.
        """
        ...

    def new_cache(self, tokens: int, device: torch.device) -> DecodeCache:
        """An empty cache for decoding one document.

        Args:
            tokens: how many tokens it will have at most.
            device: where the cache lies.
        """
        ...


@runtime_checkable
class Trunk(Protocol):
    """Embedding, layers and final norm; an ``nn.Module``. Head and loss are core's."""

    @property
    def layers(self) -> Sequence[Layer]:
        """The layers in order, as an ``nn.ModuleList`` has them."""
        ...

    def embed(self, batch: Packed) -> Tensor:
        """What the first layer reads: ``ids [T] -> [T, W]`` in the run's dtype.

        Its second dimension decides W for planning, training and merging.
        """
        ...

    def final(self, x: Tensor) -> Tensor:
        """What the head reads: ``[T, W] -> [T, H]``."""
        ...

    def aux_loss(self, batch: Packed) -> Tensor | None:
        """What the layers of a batch add to the loss, a scalar without its coefficient.

        Layers leave what it is computed from in the batch (`Packed.keep`). ``None`` if the model
        has no such term, as dense models.
        """
        ...


class TowerLayer(Protocol):
    """One layer of a tower; an ``nn.Module``. The last one's outputs are the tower's."""

    def __call__(self, x: Tensor, media: Media) -> Tensor:
        """``[U, D] -> [U, D]``; of the last layer ``[U, D] -> [n, W]``, n as `Media.where` has."""
        ...


@runtime_checkable
class Tower(Protocol):
    """Computes embeddings of media for a trunk; an ``nn.Module``, mounted at `Modality.root`.

    Core runs its layers as it runs a trunk's: activation checkpointing is decided there, and a
    merge is proved layer by layer.
    """

    @property
    def layers(self) -> Sequence[TowerLayer]:
        """The layers in order."""
        ...

    def embed(self, media: Media) -> Tensor:
        """What the first layer reads: ``values [U, F] -> [U, D]`` in the run's dtype."""
        ...

    def sample(
        self, units: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Media:
        """Invented media, for planning (on meta) and for the proof of a merge.

        Args:
            units: how many units; rounded up to what a grid allows.
            device: where the tensors lie.
            generator: of the values, on the CPU; without one they are left undefined.
        """
        ...
