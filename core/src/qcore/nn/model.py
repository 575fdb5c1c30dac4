"""The model: trunk, head, tower and adapters as one module, built on the meta device.

This file proves that every tensor of every loaded part is a module's parameter, hands out the
modules that blocks are built from (`Context`), and runs the layers. Which maps carry LoRA is
decided in `adapter.targets`; `load` reads the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..api.blocks import LinearLayer, Media, Packed
from ..api.parameters import Kind
from ..api.parameters import Tensor as Entry
from ..api.records import Architecture, Modality
from ..checkpoint.layout import Layout
from ..errors import PluginError
from ..plugins.manager import Owner, owner_of
from .kernels.registry import Used
from .layer_errors import GuardedTower, GuardedTrunk, LayerGuard
from .loss import cross_entropy_sum
from .moe.experts import Experts, grouped
from .mounting import mount, prove_total
from .qlora.fused import reference
from .qlora.linear import Linear
from .qlora.lora_layer import Lora, LoraLayer
from .qlora.nf4 import dequantize
from .qlora.stacked_linear import Stacked
from .recompute import run_layers
from .sharding.base import ShardedBase
from .token_rows import TrainedRows, cross_entropy_sum_of_rows

Numbers = Mapping[str, Lora]  #: LoRA's numbers by canonical name of the weight
_F = TypeVar("_F", bound=Callable[..., Any])
_A = TypeVar("_A", Linear, Experts)


class Backends(Protocol):
    """Which backend each op has (`qcore.nn.kernels.registry.Chosen`)."""

    def get(self, op: str) -> Callable[..., Any] | None:
        """The function that computes `op`, or ``None`` if its reference does."""
        ...


class References:
    """Backends of a model in which references compute every op.

    Attributes:
        ops: the ops that blocks asked for.
    """

    def __init__(self) -> None:
        self.ops: set[str] = set()

    def get(self, op: str) -> None:
        """``None``, whatever the op."""
        self.ops.add(op)


class Context:
    """The `BuildContext` of one model: creates modules on meta and records them."""

    def __init__(
        self,
        root: str,
        config: Mapping[str, Any],
        layout: Layout,
        dtype: torch.dtype,
        lora: Numbers,
        backends: Backends,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.used: set[str] = set()
        self.lora_layers: dict[str, LoraLayer] = {}
        self._root = root
        self._layout = layout
        self._lora = lora
        self._backends = backends

    def below(self, root: str) -> Context:
        """A context with the same records for blocks that are mounted at another root."""
        other = copy(self)
        other._root = root
        return other

    def linear(self, name: str) -> Linear:
        """A `Linear` for the row ``{name}.weight``."""
        compute = self.kernel("qlora_linear", reference)
        return self._held(self._entry(f"{name}.weight"), Linear, compute)

    def experts(self, name: str) -> Experts:
        """An `Experts` for the row `name`."""
        return self._held(self._entry(name), Experts, self.kernel("experts", grouped))

    def stack(self, *linears: LinearLayer) -> Stacked:
        """Linear maps that read the same x, as one."""
        members = tuple(cast(Linear, linear) for linear in linears)
        return Stacked(members, self.kernel("qlora_linear", reference))

    def kernel(self, op: str, reference: _F) -> _F:
        """The chosen backend of `op`, or `reference`."""
        return cast(_F, self._backends.get(op) or reference)

    def _held(self, entry: Entry, build: type[_A], compute: Callable[..., Any]) -> _A:
        if (build is Experts) != (entry.row.kind is Kind.EXPERTS):
            raise PluginError(
                "QC-MODEL-004",
                f"is built as {build.__name__} but its row is of another kind",
                field=entry.name,
                found=entry.row.kind.value if entry.row.kind else "no kind",
                fix="report this to the plugin's author",
            )
        lora, read = self._lora.get(entry.name), self.kernel("nf4_dequantize", dequantize)
        module = build(entry.shape, self.dtype, lora, dequantize=read, compute=compute)
        self.lora_layers[entry.name] = module
        return module

    def tensor(self, name: str) -> nn.Parameter:
        """A frozen parameter on meta for the row `name`."""
        entry = self._entry(name)
        return nn.Parameter(torch.empty(entry.shape, device="meta"), requires_grad=False)

    def _entry(self, name: str) -> Entry:
        full = f"{self._root}.{name}"
        if full not in self._layout.table.tensors:
            raise PluginError(
                "QC-MODEL-001",
                "is built but is in no row of the table",
                field=full,
                fix="report this to the plugin's author",
            )
        self.used.add(full)
        return self._layout.table[full]


class Model(nn.Module):
    """Trunk, head and adapters. Parameter names are the table's canonical names.

    Attributes:
        trunk: the plugin's blocks, mounted at the architecture's root.
        tower: what computes embeddings of media, mounted at the modality's root; ``None`` if
            this run loads none.
        lora_layers: the maps that the context created, by canonical name of the weight.
        head_name: canonical name of the tensor that scores the vocabulary.
        embed_name: canonical name of the embedding of tokens.
        trained_rows: rows of both that are trained; ``None`` if there are none.
        sharded: the weights of the layers, where each rank holds some rows of them.

    Args (beside the first ones):
        modality: its tower is built if the layout loads its part.
        token_ids: rows of the embedding that are trained (`token_rows`).
        head_token_ids: the same of a head that is not tied to it.
    """

    trunk: GuardedTrunk
    tower: GuardedTower | None

    def __init__(
        self,
        architecture: Architecture,
        config: Mapping[str, Any],
        layout: Layout,
        dtype: torch.dtype,
        lora: Numbers,
        backends: Backends | None = None,
        *,
        modality: Modality | None = None,
        token_ids: Sequence[int] = (),
        head_token_ids: Sequence[int] = (),
    ) -> None:
        super().__init__()
        backends = backends or References()
        context = Context(architecture.root, config, layout, dtype, lora, backends)
        trunk = architecture.build(context)
        mount(self, architecture.root, cast(nn.Module, trunk))
        self.dtype = dtype
        self.lora_layers = context.lora_layers
        self.dropout = any(numbers.lora_dropout > 0 for numbers in lora.values())
        self._cross_entropy = context.kernel("cross_entropy", cross_entropy_sum)
        # Not through nn.Module, which would register the trunk a second time, as "trunk".
        owner = owner_of(architecture.build)
        object.__setattr__(self, "trunk", GuardedTrunk(trunk, owner, architecture.root))
        head = next((entry for entry in layout.table if entry.row.group == "head"), None)
        if head is None:
            raise PluginError(
                "QC-MODEL-003",
                "the table has no row in group 'head'",
                field=architecture.name,
                fix="report this to the plugin's author",
            )
        self.head_name = head.row.tie or head.name
        self.embed_name = next(
            (e.name for e in layout.table if e.part is head.part and e.row.group == "embed"), ""
        )
        self.trained_rows: TrainedRows | None = None
        if token_ids or head_token_ids:
            tied = self.head_name == self.embed_name
            self.trained_rows = TrainedRows(token_ids, head_token_ids, head.shape[1], tied=tied)
        if head.row.tie is None:
            context.used.add(head.name)
            holder = nn.Module()
            meta = torch.empty(head.shape, device="meta")
            holder.register_parameter("weight", nn.Parameter(meta, requires_grad=False))
            mount(self, head.name.removesuffix(".weight"), holder)
        guarded: GuardedTower | None = None
        if modality is not None and layout.loads(layout.table.part(modality.name)):
            tower = modality.build(context.below(modality.root))
            mount(self, modality.root, cast(nn.Module, tower))
            guarded = GuardedTower(tower, owner_of(modality.build), modality.root)
        object.__setattr__(self, "tower", guarded)  # as the trunk
        prove_total(layout, context.used | {head.name})
        self.sharded: ShardedBase | None = None
        self._unnamed = LayerGuard(owner, architecture.name)
        self._guards = self._layer_guards(architecture, modality)

    def _layer_guards(
        self, architecture: Architecture, modality: Modality | None
    ) -> dict[int, LayerGuard]:
        """A guard for each layer of trunk and tower, by the layer's identity."""
        names = {id(module): name for name, module in self.named_modules()}
        runs: list[tuple[Sequence[object], Owner]] = [
            (self.trunk.layers, owner_of(architecture.build))
        ]
        if modality is not None and self.tower is not None:
            runs.append((self.tower.layers, owner_of(modality.build)))
        return {
            id(layer): LayerGuard(owner, names.get(id(layer), f"layer {number}"))
            for layers, owner in runs
            for number, layer in enumerate(layers)
        }

    def guard(self, layer: object) -> LayerGuard:
        """The context in which a layer runs: what it raises names its plugin and the layer."""
        return self._guards.get(id(layer), self._unnamed)

    def guards(self, layers: Iterable[object]) -> list[LayerGuard]:
        """The contexts of several layers, in their order."""
        return [self.guard(layer) for layer in layers]

    @property
    def trains_tower(self) -> bool:
        """Whether a map of the tower carries LoRA; otherwise it runs without autograd."""
        return any(
            isinstance(module, LoraLayer) and module.lora is not None for module in self.in_tower()
        )

    @property
    def trains_trunk(self) -> bool:
        """Whether a map outside the tower carries LoRA."""
        of_tower = self.in_tower()
        return self.trained_rows is not None or any(
            module not in of_tower for _, module in self.adapters()
        )

    def in_tower(self) -> frozenset[nn.Module]:
        """All modules of the tower."""
        return frozenset() if self.tower is None else frozenset(self.tower.module.modules())

    @property
    def head(self) -> Tensor:
        """``[V, H]``, frozen."""
        return self.get_parameter(self.head_name)

    def adapters(self) -> Iterator[tuple[str, LoraLayer]]:
        """(canonical name of the weight, module) of each map that carries LoRA."""
        for name, module in self.lora_layers.items():
            if module.lora is not None:
                yield name, module

    def beside_adapters(self) -> list[nn.Parameter]:
        """Trained parameters that belong to no map."""
        return [] if self.trained_rows is None else list(self.trained_rows.parameters())

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of each trained parameter, in a fixed order."""
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def media(self, media: Media, *, recompute: str = "none") -> Tensor:
        """The tower's embeddings of media, ``[n, W]``.

        Args:
            media: of a pack.
            recompute: activation checkpointing policy of every layer of the tower.
        """
        if media.features is not None:
            return media.features
        tower = self.tower
        if tower is None:
            raise ValueError("this model was built without a tower, and the pack has media")
        layers = tower.layers
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains_tower):
            each = [recompute] * len(layers)
            # Do not bind the first input to a name: it must be freed once the first layer has run.
            return run_layers(
                layers, tower.embed(media), media, each,
                dropout=self.dropout, guards=self.guards(layers),
            )  # fmt: skip

    def embed(self, batch: Packed, *, recompute: str = "none") -> Tensor:
        """What the first layer reads, ``[T, W]``: embeddings of tokens and of media.

        Args:
            batch: the pack.
            recompute: as in `media`.
        """
        if self.trained_rows is not None:
            self.trained_rows.write(self.get_parameter(self.embed_name), self.head)
        x = self.trunk.embed(batch)
        if self.trained_rows is not None:
            x = self.trained_rows.attach(x, batch.ids)
        if batch.media is None:
            return x
        embeddings = self.media(batch.media, recompute=recompute).to(x.dtype)
        where = batch.media.where
        if len(embeddings) != len(where):
            raise ValueError(f"{len(embeddings)} embeddings for {len(where)} tokens")
        return x.index_copy(0, where, embeddings)

    def hidden(self, batch: Packed, *, recompute: str | Sequence[str] = "none") -> Tensor:
        """What the head reads, ``[T, H]``.

        Args:
            batch: the pack.
            recompute: activation checkpointing policy (`recompute.POLICIES`), of all layers or
                of each.
        """
        layers = self.trunk.layers
        each = [recompute] * len(layers) if isinstance(recompute, str) else recompute
        tower = "none" if set(each) <= {"none"} else "full"
        # As in `media`, the first input is not bound to a name.
        x = run_layers(
            layers, self.embed(batch, recompute=tower), batch, each,
            dropout=self.dropout, guards=self.guards(layers),
            gathers=None if self.sharded is None else self.sharded.gathers,
        )  # fmt: skip
        return self.trunk.final(x)

    def loss(
        self, batch: Packed, *, recompute: str | Sequence[str] = "none", chunk: int = 0
    ) -> Tensor:
        """Sum of the cross entropy over supervised positions.

        Args:
            batch: the pack, with targets.
            recompute: as in `hidden`.
            chunk: positions whose logits exist at a time; 0: the default of `cross_entropy_sum`.
        """
        assert batch.targets is not None
        where = batch.supervised()
        hidden = self.hidden(batch, recompute=recompute).index_select(0, where)
        wanted = batch.targets.index_select(0, where)
        return self.token_loss(hidden, wanted, chunk)

    def token_loss(self, hidden: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
        """Sum of the cross entropy over positions.

        Args:
            hidden: what the head reads of them, ``[S, H]``.
            targets: ``[S]``.
            chunk: as in `loss`.
        """
        rows = None if self.trained_rows is None else self.trained_rows.of_logits
        if rows is not None:
            return cross_entropy_sum_of_rows(hidden, self.head, targets, rows, chunk or None)
        return self._cross_entropy(hidden, self.head, targets, chunk or None)

    def logits(self, batch: Packed) -> Tensor:
        """All logits ``[T, V]``; for generation and for tests, never in training."""
        return F.linear(self.hidden(batch), self.head)


def ops_of(
    architecture: Architecture,
    config: Mapping[str, Any],
    layout: Layout,
    modality: Modality | None = None,
) -> Used:
    """The ops that the model of a config uses: only their backends must be verified."""
    asked = References()
    Model(architecture, config, layout, torch.bfloat16, {}, asked, modality=modality)
    return Used(ops=frozenset(asked.ops), config=config)
