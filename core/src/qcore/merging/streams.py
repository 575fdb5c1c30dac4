"""Verifies a merge layer by layer: runs base, base + adapter and merged model, and compares them.

This file decides how layers are put into memory one at a time, what each stream runs, and how far
the outputs of a layer may differ: by float32 summed in another order. Why each layer is compared
on its own is said in `verify`.

Shapes: T tokens, N documents, H hidden size, n outputs of a tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..adapter.delta import WORKERS, Deltas, single
from ..adapter.peft_names import Adapter, trunk_part
from ..api.blocks import Packed, Tower
from ..api.parameters import Kind
from ..api.records import Modality
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.layout import Located, survey
from ..checkpoint.layout_faults import faults
from ..errors import NumericError, raise_all
from ..nn.load import place, read_tensor, slabs
from ..nn.model import Model
from ..nn.moe.experts import Experts
from ..nn.qlora.lora_layer import Lora, LoraLayer
from ..plugins.resolve_model import Identified
from .disk_rows import blocks, gather, is_rounded, read_or_stand_in, rows_of
from .folds import Folds
from .routes import moved, routes

_DOCUMENTS, _TOKENS = 8, 5  # longer than a convolution kernel; reading weights takes most time
_UNITS = 60  # of synthetic media, about: no power of two
#: Allowed share of what a layer adds, and of its output: float32 summed in another order.
_ADDED, _OUTPUT = 1e-5, 1e-6
#: Share of tokens that rounding may send to other experts in a layer; more is a fault.
_REROUTED = 0.1
_CUT = 2**26  # bytes of a stack that one thread compares with the files at a time


class _Inputs(NamedTuple):
    """The input of a layer in each stream; that of the base may have fewer rows."""

    base: Tensor
    adapted: Tensor
    merged: Tensor


def _tower_of(base: Identified, adapter: Adapter) -> Modality | None:
    """The modality whose tower the adapter changes."""
    modalities = base.decision.modalities
    return next((modality for modality in modalities if modality.name in adapter.parts), None)


class Streams:
    """The model on the meta device, of which one layer at a time is in memory."""

    def __init__(
        self,
        base: Identified,
        adapter: Adapter,
        deltas: Deltas,
        written: Path,
        progress: Callable[[int], None],
    ) -> None:
        self.adapter = adapter
        self.worst = 0.0  # of a layer's difference, as a share of what is allowed
        self.rerouted = 0
        self.proved: set[str] = set()
        self.written = Checkpoint.open(written)
        self.written_layout, problems = survey(base.layout.table, self.written)
        raise_all(faults(problems))
        modality = _tower_of(base, adapter)
        base = base.using_parts(adapter.parts)
        self.checkpoint = base.checkpoint
        self.layout = base.layout
        # An unloaded part may name tensors as the trunk does: a name alone selects none of them.
        self.loaded = {
            name: item
            for name, item in base.layout.located.items()
            if base.layout.loads(item.tensor.part)
        }
        self.tower_effect: float | None = None
        self.stand_ins = sum(item.packed is not None for item in self.loaded.values())
        self.progress = progress
        self.deltas = deltas
        lora = {
            name: Lora(r=pair.r, lora_alpha=pair.scaling * pair.r)
            for name, pair in adapter.pairs.items()
            if pair.tensor.row.kind is not None
        }
        architecture = base.decision.architecture
        config = base.checkpoint.config
        self.model = Model(
            architecture, config, base.layout, torch.float32, lora, modality=modality
        ).eval()
        self.folds = Folds(self.model, adapter, deltas)
        self.modules = dict(self.model.named_modules())
        tower = self.model.tower
        self.trunk_layers = self._named_layers(self.model.trunk.layers)
        self.tower_layers = self._named_layers(tower.layers if tower is not None else ())

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Run all layers; returns the input of the head, base ``[T / N, H]``, others ``[T, H]``."""
        tower, trunk, batch = self.model.tower, self.model.trunk, self._batch()
        first = Packed.of([batch.ids[:_TOKENS]])
        both = Packed.of(list(batch.ids.view(-1, _TOKENS)) * 2)
        base, adapted = trunk.embed(first), trunk.embed(batch)
        x = _Inputs(base, adapted, adapted)
        if tower is not None:
            x = _with_media(x, self._through_tower(tower))

        def two(layer: nn.Module, adapted: Tensor, merged: Tensor) -> Sequence[Tensor]:
            return cast(Tensor, layer(torch.cat([adapted, merged]), both)).chunk(2)

        x = self._through(self.trunk_layers, x, first, batch, two)
        if self.proved != self.adapter.changes.keys():
            raise NumericError(
                "QC-MERGE-004",
                "is in no layer, so that its effect is not proved",
                file=self.adapter.path,
                field=min(self.adapter.changes.keys() - self.proved),
                fix="report this to the plugin's author",
            )
        self._place_rest()
        return trunk.final(x.base), trunk.final(x.adapted), trunk.final(x.merged)

    def _through_tower(self, tower: Tower) -> _Inputs:
        """The tower's outputs ``[n, H]`` for one synthetic medium, in each stream."""
        self._place_rest()
        media = tower.sample(_UNITS, torch.device("cpu"), torch.Generator().manual_seed(1))

        def two(layer: nn.Module, adapted: Tensor, merged: Tensor) -> Sequence[Tensor]:
            return layer(adapted, media), layer(merged, media)

        x = tower.embed(media)
        out = self._through(self.tower_layers, _Inputs(x, x, x), media, media, two)
        self.tower_effect = float((out.adapted - out.base).abs().max())
        return out

    def _through(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        x: _Inputs,
        first: Any,
        batch: Any,
        two: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]],
    ) -> _Inputs:
        """Run the streams through layers, and compare each layer.

        Args:
            layers: name of the module, and the module.
            x: input of the first layer.
            first: the pack of the base's stream, its first document; or the media.
            batch: those of the adapted stream.
            two: runs a layer on two streams, ``(layer, adapted, merged)``.
        """
        base, adapted, merged = x
        for prefix, layer, values in self._layers(layers):
            with self._real(prefix, layer, values) as maps:
                guard = self.model.guard(layer)
                self.folds.put(f"{prefix}.")
                with routes(layer) as picked, guard:
                    after = layer(adapted, batch)
                self.folds.restore()
                for module in maps.values():
                    module.lora = None
                with guard:
                    base = layer(base, first)
                for name, module in maps.items():
                    self._merge(name, module)
                # The merged weights run on the adapted stream, to compare, and on their own.
                with routes(layer) as again, guard:
                    same, merged = two(layer, adapted, merged)
                self._check_layer(prefix, adapted, after, same, moved(picked, again))
                adapted = after
        return _Inputs(base, adapted, merged)

    def _place_rest(self) -> None:
        """Read the weights outside the layers, except the head."""
        prefixes = tuple(f"{prefix}." for prefix, _ in (*self.tower_layers, *self.trunk_layers))
        for name, parameter in self.model.named_parameters():
            rest = name != self.model.head_name and not name.startswith(prefixes)
            if parameter.is_meta and rest and name in self.loaded:
                self._place(name, read_or_stand_in(self.checkpoint, self.loaded[name]))

    def _check_layer(
        self, prefix: str, x: Tensor, adapted: Tensor, merged: Tensor, moved: Tensor | None
    ) -> None:
        """Compare the outputs ``[T, H]`` of a layer with adapter and merged, from the same `x`.

        Tokens that changed experts are only counted. The last layer of a tower may return fewer
        rows than it reads; then its whole output is what it adds.
        """
        if not bool(adapted.isfinite().all()):
            raise NumericError(
                "QC-MERGE-003",
                "gives values that are not finite",
                file=self.adapter.path,
                field=prefix,
                fix="train again with a lower learning_rate",
            )
        off = (merged - adapted).abs().amax(1)
        if moved is not None and int(moved.sum()) <= len(x) * _REROUTED:
            self.rerouted += int(moved.sum())
            off = off.masked_fill(moved, 0)
        added = adapted - x if adapted.shape == x.shape else adapted
        allowed = _ADDED * float(added.abs().max()) + _OUTPUT * float(adapted.abs().max())
        worst = float(off.max())
        if not worst <= allowed:
            raise NumericError(
                "QC-MERGE-005",
                "computes other values than base + adapter",
                file=self.adapter.path,
                field=prefix,
                found=f"{worst:.2e}",
                expected=f"<= {allowed:.0e}",
                fix="report this: the adapter would not do in the merge what it did in training",
            )
        self.worst = max(self.worst, worst / allowed if allowed else 0.0)

    def _merge(self, name: str, module: LoraLayer) -> None:
        """Add the adapter to a weight by the arithmetic of the merge, so that its faults show."""
        self.proved.add(name)
        item = self.layout.located[name]
        if isinstance(module, Experts):
            with ThreadPoolExecutor(WORKERS, initializer=single) as pool:
                for _ in pool.map(lambda rows: self._check_sum(item, rows), slabs(item, _CUT)):
                    pass
            module.read_from(lambda expert: self._sum(item, slice(expert, expert + 1))[0])
            return
        weight = module.weight
        assert weight is not None
        every = slice(0, len(weight))
        for view, total in self.deltas.add(name, weight.data, rows_of(item, every)):
            view.copy_(total)
        self._check_written(item, every, weight)

    def _check_sum(self, item: Located, rows: slice) -> None:
        self._check_written(item, rows, self._sum(item, rows))

    def _sum(self, item: Located, rows: slice) -> Tensor:
        """Some experts of a stack, float32, with the adapter added to one at a time.

        Logits are computed from experts one at a time, and the files must hold those sums; the
        merge itself adds several experts at once.
        """
        weight = read_tensor(self.checkpoint, item, rows).float()
        for expert, matrix in zip(range(rows.start, rows.stop), weight, strict=True):
            region = rows_of(item, slice(expert, expert + 1))
            for view, total in self.deltas.add(item.tensor.name, matrix, region):
                view.copy_(total)
        return weight

    def _check_written(self, item: Located, rows: slice, weight: Tensor) -> None:
        """Compare the files with `weight`, which is ``tensor[rows]``, rounded to their dtype."""
        there = self.written_layout.located[item.tensor.name]
        if not is_rounded(read_tensor(self.written, there, rows), weight):
            header = there.places[0].header
            raise NumericError(
                "QC-MERGE-007",
                "does not hold the sum that was proved",
                file=self.written.path / header.file,
                field=item.tensor.name,
                fix="report this: the merge wrote another tensor than it computed",
            )

    def compare(self, base: Tensor, adapted: Tensor, merged: Tensor) -> dict[str, float]:
        """The largest differences of logits; the head is read a few rows at a time."""
        difference = effect = scale = 0.0
        for rows in blocks(self.checkpoint, self.layout.located[self.model.head_name]):
            both = torch.cat([adapted, merged, base]) @ rows.t()
            with_adapter, after_merge, plain = torch.split(
                both, [len(adapted), len(merged), len(base)]
            )
            difference = max(difference, float((after_merge - with_adapter).abs().max()))
            effect = max(effect, float((with_adapter[: len(plain)] - plain).abs().max()))
            scale = max(scale, float(with_adapter.abs().max()))
        return {
            "layers": self.worst,
            "difference": difference,
            "effect": effect,
            "scale": scale,
            "rerouted": float(self.rerouted),
            **({} if self.tower_effect is None else {"tower_effect": self.tower_effect}),
            **({"stand_ins": float(self.stand_ins)} if self.stand_ins else {}),
        }

    def _batch(self) -> Packed:
        """Random documents over a small vocabulary: only its rows of the embedding are read."""
        trunk = trunk_part(self.layout.table)
        entry = next(e for e in self.layout.table if e.part is trunk and e.row.group == "embed")
        count = min(_DOCUMENTS * _TOKENS, entry.shape[0])
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(entry.shape[0], (count,), generator=generator).tolist()
        weight = gather(self.checkpoint, self.layout.located[entry.name], rows)
        parent, _, leaf = entry.name.rpartition(".")
        embed = nn.Parameter(weight, requires_grad=False)
        self.modules[parent]._parameters[leaf] = embed
        ids = torch.randint(count, (_DOCUMENTS, _TOKENS), generator=generator)
        return Packed.of(list(ids))

    def _named_layers(self, layers: Sequence[Any]) -> list[tuple[str, nn.Module]]:
        names = {id(module): name for name, module in self.modules.items()}
        return [(names[id(layer)], layer) for layer in layers]

    def _layers(
        self, layers: Sequence[tuple[str, nn.Module]]
    ) -> Iterator[tuple[str, nn.Module, dict[str, Tensor]]]:
        """Each layer and its tensors, float32; those of the next layer are read meanwhile.

        Experts are left out: each is read when a token is routed to it.
        """

        def read(prefix: str) -> dict[str, Tensor]:
            return {
                name: read_or_stand_in(self.checkpoint, item).float()
                for name, item in self.loaded.items()
                if name.startswith(f"{prefix}.") and item.tensor.row.kind is not Kind.EXPERTS
            }

        with ThreadPoolExecutor(1, initializer=single) as pool:
            ahead = pool.submit(read, layers[0][0])
            for number, (prefix, layer) in enumerate(layers):
                values = ahead.result()
                if number + 1 < len(layers):
                    ahead = pool.submit(read, layers[number + 1][0])
                yield prefix, layer, values

    @contextmanager
    def _real(
        self, prefix: str, layer: nn.Module, values: dict[str, Tensor]
    ) -> Iterator[dict[str, LoraLayer]]:
        """Hold the weights and adapters of a layer in memory for a block.

        Yields:
            The linear maps that carry LoRA, by canonical name of the weight.
        """
        for name in list(values):
            self._place(name, values.pop(name))
        holders = {n: m for n, m in self.model.lora_layers.items() if n.startswith(f"{prefix}.")}
        stacks = {name: module for name, module in holders.items() if isinstance(module, Experts)}
        for name, module in stacks.items():
            module.read_from(self._reader(self.layout.located[name]))
        adapted = {name: module for name, module in holders.items() if module.lora is not None}
        for name, holder in adapted.items():
            holder.set_lora(*self.deltas.sides(name))
        yield adapted
        for stack in stacks.values():
            stack.read_from(None)
        for part in layer.modules():
            for leaf, parameter in list(part._parameters.items()):
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    part._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def _reader(self, item: Located) -> Callable[[int], Tensor]:
        def read(expert: int) -> Tensor:
            return read_or_stand_in(self.checkpoint, item, slice(expert, expert + 1))[0].float()

        return read

    def _place(self, name: str, value: Tensor) -> None:
        item = self.layout.located[name]
        place(self.model, self.modules, item, slice(0, len(value)), value, quantize=False)
        self.progress(sum(where.header.end - where.header.start for where in item.places))


def _with_media(x: _Inputs, media: _Inputs) -> _Inputs:
    """Replace embeddings of the first document, except the last, by the outputs of a tower.

    So the tower has an effect on logits, as media in a row have.
    """

    def put(tokens: Tensor, outputs: Tensor) -> Tensor:
        count = min(len(outputs), _TOKENS - 1)
        return torch.cat([outputs[:count], tokens[count:]])

    return _Inputs(*(put(tokens, outputs) for tokens, outputs in zip(x, media, strict=True)))
