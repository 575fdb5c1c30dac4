"""The protocols between core and a plugin's blocks, the packed batch and its media.

This file decides what a trunk is to core. Core owns the loop over layers (recompute lives
there once), the head and the loss; a plugin owns the blocks. Parameter names inside a trunk
are the table's names less `Architecture.root`.

Shapes: T tokens of all documents in the pack, H hidden size, N documents; U units
of media (what a tower computes), F numbers of each, n embeddings that they become.
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
        features: ``[n, H]``, the outputs, where they are known already.
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
    """A linear map of core's; an ``nn.Module``, with its storage and its adapter."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """``[..., in] -> [..., out]``."""
        ...

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by name."""
        ...

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Mount a frozen parameter beside the weight, e.g. ``bias``; the plugin adds it."""
        ...


class ExpertRouting(Protocol):
    """Which rows each expert gets, as an `ExpertsLayer` reads it; `qcore.ops.Routing` is one."""

    @property
    def counts(self) -> Tensor:
        """``[E]`` int64, rows of each expert."""
        ...


class ExpertsLayer(Protocol):
    """One linear map per expert; an ``nn.Module``, with its storage and its adapter."""

    def __call__(
        self, x: Tensor, routing: ExpertRouting, tokens: Literal["in", "out"] | None = None
    ) -> Tensor:
        """``[R, in] -> [R, out]``, rows sorted by expert.

        Args:
            x: rows ``[R, in]``; with `tokens` "in", tokens ``[T, in]``, gathered inside.
            routing: where rows go.
            tokens: "out" gives ``[T, out]``, the sum of each token's rows.
        """
        ...


class BuildContext(Protocol):
    """What blocks are built from: core decides storage, adapter and device.

    Everything is created on the meta device with the table's shape; `qcore.nn.load` fills it.
    Names are relative to `Architecture.root`.
    """

    config: Mapping[str, Any]  #: config.json, whole
    dtype: torch.dtype  #: dtype of activations

    def linear(self, name: str) -> LinearLayer:
        """A linear map ``[..., in] -> [..., out]`` for the row ``{name}.weight``."""
        ...

    def experts(self, name: str) -> ExpertsLayer:
        """One linear map per expert, for the row `name` ``[experts, out, in]``."""
        ...

    def stack(self, *linears: LinearLayer) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """Maps that read the same x, as one: ``[..., in] -> ([..., out], ...)``, in their order.

        Args:
            linears: what `linear` gave; they stay the caller's modules, under their own names.
        """
        ...

    def tensor(self, name: str) -> nn.Parameter:
        """A frozen parameter for the row `name`, e.g. a norm's weight."""
        ...

    def kernel(self, op: str, reference: _F) -> _F:
        """The backend that the run chose for `op`, called as `reference` is; else `reference`."""
        ...


@runtime_checkable
class DecodeCache(Protocol):
    """A layer's cache that a captured step of decoding can advance: its tensors stay in place.

    A cache without these methods is advanced one token at a time, without a CUDA graph.
    """

    def reset(self) -> None:
        """Begin another document, which grows as with any cache until `hold` is called."""
        ...

    def hold(self, at: Tensor, span: int) -> None:
        """From now on each call of the layer brings one token.

        Args:
            at: ``[1]`` int64 on the device, how many tokens came before; core counts them.
            span: tokens of the cache that are read, this one included.
        """
        ...


@runtime_checkable
class Layer(Protocol):
    """One residual layer of a trunk; an ``nn.Module``."""

    def __call__(self, x: Tensor, batch: Packed, cache: Any | None = None) -> Tensor:
        """``[T, H] -> [T, H]``.

        With a cache, `batch` holds the next tokens of one document and the cache is advanced
        in place.
        """
        ...

    def new_cache(self, tokens: int, device: torch.device) -> Any:
        """State for decoding one document of at most `tokens` tokens.

        A `DecodeCache` where one token can be captured in a CUDA graph; else anything.
        """
        ...


@runtime_checkable
class Trunk(Protocol):
    """Embedding, layers and final norm; an ``nn.Module``. Head and loss are core's."""

    layers: Sequence[Layer]

    def embed(self, batch: Packed) -> Tensor:
        """``ids [T] -> [T, H]`` in the run's dtype."""
        ...

    def final(self, x: Tensor) -> Tensor:
        """What the head reads: ``[T, H] -> [T, H]``."""
        ...

    def aux_loss(self, batch: Packed) -> Tensor | None:
        """What the layers of a batch add to the loss, without its coefficient.

        ``None`` where the model has no such term: a dense model.
        """
        ...


class TowerLayer(Protocol):
    """One layer of a tower; an ``nn.Module``. The last one's outputs are the tower's."""

    def __call__(self, x: Tensor, media: Any) -> Tensor:
        """``[U, D] -> [U, D]``; of the last ``[U, D] -> [n, H]``, n as `Media.where` has."""
        ...


@runtime_checkable
class Tower(Protocol):
    """What turns media into embeddings of the trunk's; an ``nn.Module``, mounted at its root.

    Core runs its layers, as it does a trunk's: what is computed again in backward is decided
    there, and a merge is proved layer by layer.
    """

    layers: Sequence[TowerLayer]

    def embed(self, media: Any) -> Tensor:
        """What the first layer reads: ``values [U, F] -> [U, D]`` in the run's dtype."""
        ...

    def sample(
        self, units: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Media:
        """Made-up media of about so many units, for planning (on meta) and for proofs.

        Args:
            units: how many; what the grid does not allow is rounded up.
            device: where they lie.
            generator: of the values, on the CPU; without one they are left undefined.
        """
        ...
