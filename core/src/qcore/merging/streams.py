"""Verifies a merge layer by layer: runs base, base + adapter and merged model, and compares them.

This file decides how layers are put into memory one at a time and what each stream runs. Why each
layer is compared on its own is said in `verify`; `layer_judge` decides how far outputs may differ.

Shapes: T tokens, N documents, H hidden size, n outputs of a tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..adapter.delta import Deltas, single
from ..adapter.peft_names import Adapter
from ..api.blocks import Packed, Tower
from ..api.parameters import Kind
from ..api.records import Modality
from ..checkpoint.layout import Located
from ..errors import NumericError
from ..nn.load import place
from ..nn.model import Model
from ..nn.moe.experts import Experts
from ..nn.qlora.lora_layer import Lora, LoraLayer
from ..plugins.resolve_model import Identified
from .amplification import amplification
from .disk_rows import read_or_stand_in
from .folds import Folds
from .layer_judge import LayerJudge
from .routes import moved, routes
from .stream_inputs import Inputs, with_media
from .vocabulary import Vocabulary
from .written_merge import WrittenMerge

_DOCUMENTS, _TOKENS = 8, 5  # longer than a convolution kernel; reading weights takes most time
_UNITS = 60  # of synthetic media, about: no power of two

_X = TypeVar("_X")


def _tower_of(base: Identified, adapter: Adapter) -> Modality | None:
    """The modality whose tower the adapter changes."""
    modalities = base.decision.modalities
    return next((modality for modality in modalities if modality.name in adapter.parts), None)


def _run(layer: nn.Module, batch: Any, x: Tensor) -> Tensor:
    """Run a layer on another input."""
    return cast(Tensor, layer(x, batch))


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
        self.judge = LayerJudge(adapter.path)
        self.proved: set[str] = set()
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
        self.written = WrittenMerge(self.checkpoint, self.layout, deltas, written)
        self.vocabulary = Vocabulary(
            self.checkpoint, self.layout, self.model.head_name, adapter, self.folds, self.written
        )
        self.modules = dict(self.model.named_modules())
        tower = self.model.tower
        self.trunk_layers = self._named_layers(self.model.trunk.layers)
        self.tower_layers = self._named_layers(tower.layers if tower is not None else ())

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Run all layers; returns the input of the head, base ``[T / N, H]``, others ``[T, H]``."""
        tower, trunk = self.model.tower, self.model.trunk
        x, batch = self._embedded()
        first = Packed.of([batch.ids[:_TOKENS]])
        both = Packed.of(list(batch.ids.view(-1, _TOKENS)) * 2)
        if tower is not None:
            x = with_media(x, self._through_tower(tower), _TOKENS)

        def two(layer: nn.Module, adapted: Tensor, merged: Tensor) -> Sequence[Tensor]:
            return cast(Tensor, layer(torch.cat([adapted, merged]), both)).chunk(2)

        x = self._through(self.trunk_layers, x, first, batch, two)
        self._place_rest()
        return self._outside("the last norm", x, trunk.final)

    def _embedded(self) -> tuple[Inputs, Packed]:
        """Random documents over a few rows of the embedding, and their embeddings."""
        trunk, entry = self.model.trunk, self.vocabulary.entry
        rows = self.vocabulary.rows(_DOCUMENTS * _TOKENS)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(len(rows.base), (_DOCUMENTS, _TOKENS), generator=generator)
        ids[0, 0] = 0  # a row that the adapter replaces, if there is one
        batch = Packed.of(list(ids))
        parent, _, leaf = entry.name.rpartition(".")

        def embed(weight: Tensor, batch: Packed) -> Tensor:
            held = nn.Parameter(weight, requires_grad=False)
            self.modules[parent]._parameters[leaf] = held
            return trunk.embed(batch)

        merged, adapted = embed(rows.merged, batch), embed(rows.adapted, batch)
        base = embed(rows.base, Packed.of([batch.ids[:_TOKENS]]))
        x = Inputs(base, adapted, merged)
        if entry.name in self.adapter.folded:
            plain = embed(rows.base, batch)
            self.judge.layer(entry.name, plain, adapted, merged, None)
        return x, batch

    def _through_tower(self, tower: Tower) -> Inputs:
        """The tower's outputs ``[n, H]`` for one synthetic medium, in each stream."""
        self._place_rest()
        media = tower.sample(_UNITS, torch.device("cpu"), torch.Generator().manual_seed(1))

        def two(layer: nn.Module, adapted: Tensor, merged: Tensor) -> Sequence[Tensor]:
            return layer(adapted, media), layer(merged, media)

        x = self._outside("the embedding of media", (media, media, media), tower.embed)
        out = self._through(self.tower_layers, x, media, media, two)
        self.tower_effect = float((out.adapted - out.base).abs().max())
        return out

    def _outside(self, where: str, x: tuple[_X, _X, _X], run: Callable[[_X], Tensor]) -> Inputs:
        """Run what lies outside the layers on each stream, with the weights that it has there.

        Args:
            where: what runs, for errors.
            x: its input in each stream.
            run: what runs, on one input.
        """
        inside = tuple(f"{prefix}." for prefix, _ in (*self.tower_layers, *self.trunk_layers))
        others = (self.vocabulary.entry.name, self.model.head_name)
        names = {n for n in self.adapter.folded if not n.startswith(inside) and n not in others}
        out = run(x[0])
        if not names:
            return Inputs(out, run(x[1]), run(x[2]))
        plain, base = run(x[1]), self.folds.put_all(names)
        adapted = run(x[1])
        self.folds.restore()
        for name in names:
            weight = base[name].clone()
            self.written.add(self.loaded[name], weight, slice(0, len(weight)))
            self.model.get_parameter(name).data = weight
        merged, same = run(x[2]), run(x[1])
        for name in names:
            self.model.get_parameter(name).data = base[name]
        self.proved |= names
        self.judge.layer(where, plain, adapted, same, None)
        return Inputs(out, adapted, merged)

    def _through(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        x: Inputs,
        first: Any,
        batch: Any,
        two: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]],
    ) -> Inputs:
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
                self._replace(f"{prefix}.")
                # The merged weights run on the adapted stream, to compare, and on their own.
                with routes(layer) as again, guard:
                    same, merged = two(layer, adapted, merged)
                with guard:
                    self.judge.layer(
                        prefix, adapted, after, same, moved(picked, again),
                        partial(amplification, layer, partial(_run, layer, batch), adapted),
                    )  # fmt: skip
                adapted = after
        return Inputs(base, adapted, merged)

    def _place_rest(self) -> None:
        """Read the weights outside the layers, except the head."""
        prefixes = tuple(f"{prefix}." for prefix, _ in (*self.tower_layers, *self.trunk_layers))
        for name, parameter in self.model.named_parameters():
            rest = name != self.model.head_name and not name.startswith(prefixes)
            if parameter.is_meta and rest and name in self.loaded:
                self._place(name, read_or_stand_in(self.checkpoint, self.loaded[name]))

    def _merge(self, name: str, module: LoraLayer) -> None:
        """Add the adapter to a weight by the arithmetic of the merge, so that its faults show."""
        self.proved.add(name)
        item = self.layout.located[name]
        if isinstance(module, Experts):
            self.written.check(item)
            module.read_from(lambda expert: self.written.sum(item, slice(expert, expert + 1))[0])
            return
        weight = module.weight
        assert weight is not None
        self.written.add(item, weight.data, slice(0, len(weight)))

    def _replace(self, prefix: str) -> None:
        """Put saved values into the weights of a layer by the arithmetic of the merge."""
        for name in self.adapter.folded - self.adapter.pairs.keys():
            if not name.startswith(prefix):
                continue
            module = self.model.lora_layers.get(name)
            if isinstance(module, Experts):
                self._merge(name, module)
                continue
            self.proved.add(name)
            weight = self.model.get_parameter(name).data
            self.written.add(self.layout.located[name], weight, slice(0, len(weight)))

    def compare(self, base: Tensor, adapted: Tensor, merged: Tensor) -> dict[str, float]:
        """The largest differences of logits; the head is read a few rows at a time."""
        logits = self.vocabulary.compare(base, adapted, merged, self.judge.judge)
        self.proved |= self.vocabulary.proved
        if self.proved != self.adapter.changes.keys():
            raise NumericError(
                "QC-MERGE-004",
                "is in no layer, so that its effect is not proved",
                file=self.adapter.path,
                field=min(self.adapter.changes.keys() - self.proved),
                fix="report this to the plugin's author",
            )
        return {
            "layers": self.judge.worst,
            **logits,
            "rerouted": float(self.judge.rerouted),
            **({} if self.tower_effect is None else {"tower_effect": self.tower_effect}),
            **({"stand_ins": float(self.stand_ins)} if self.stand_ins else {}),
        }

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
