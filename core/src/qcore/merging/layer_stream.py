"""Our model with one layer in memory at a time, float32, for a comparison with another program.

This file decides how a layer, the embedding and the head are read for that. The forward pass is
that of training and `generate`: the plugin's blocks with core's linear maps and LoRA.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.delta import Deltas
from ..adapter.peft_names import Adapter, trunk_part
from ..api.blocks import Packed
from ..api.parameters import Kind
from ..checkpoint.layout import Located
from ..nn.load import place, read_tensor
from ..nn.model import Model
from ..nn.moe.experts import Experts
from ..nn.qlora.lora_layer import Lora
from ..plugins.resolve_model import Identified
from .disk_rows import blocks, gather, row_slices, rows_of


class LayerStream:
    """The trunk of a model on the meta device, whose weights are read when they are used.

    Args:
        base: the model.
        adapter: an adapter on it, applied as training applies it.

    Attributes:
        layers: names of the layers' modules.
    """

    def __init__(self, base: Identified, adapter: Adapter | None = None) -> None:
        base = base.untying() if adapter is not None and adapter.untied else base
        self.base, self.checkpoint = base, base.checkpoint
        pairs = adapter.lora if adapter is not None else {}
        self._deltas = None if adapter is None else Deltas(adapter)
        lora = {
            name: Lora(r=pair.r, lora_alpha=pair.scaling * pair.r) for name, pair in pairs.items()
        }
        self.model = Model(
            base.decision.architecture, base.checkpoint.config, base.layout, torch.float32, lora
        ).eval()
        self.modules = dict(self.model.named_modules())
        names = {id(module): name for name, module in self.modules.items()}
        self.layers = [names[id(layer)] for layer in self.model.trunk.layers]
        self.located = {
            name: item
            for name, item in base.layout.located.items()
            if base.layout.loads(item.tensor.part)
        }

    def disk_names(self) -> list[list[str]]:
        """Names on disk of the tensors of each layer."""
        return [
            [
                header.name
                for name, item in self.located.items()
                if name.startswith(f"{prefix}.")
                for place in item.places
                for header in (place.header, place.scale)
                if header is not None
            ]
            for prefix in self.layers
        ]

    def largest(self) -> int:
        """Bytes in float32 of the largest layer; the embedding and the head count as layers."""
        sizes = dict.fromkeys(self.layers, 0)
        outside = 0
        for name, item in self.located.items():
            prefix = next((p for p in self.layers if name.startswith(f"{p}.")), None)
            if prefix is not None:
                sizes[prefix] += item.tensor.numel * 4
            else:
                outside = max(outside, item.tensor.numel * 4)
        return max([outside, *sizes.values()])

    def total(self) -> int:
        """Bytes in float32 of everything that is loaded."""
        return sum(item.tensor.numel * 4 for item in self.located.values() if item.tied is None)

    def embed(self, batch: Packed, *, adapted: bool) -> Tensor:
        """What the first layer reads ``[T, H]``; only the rows of the tokens are read.

        Args:
            batch: the tokens.
            adapted: with the adapter, or without it.
        """
        trunk = trunk_part(self.base.layout.table)
        entry = next(
            e for e in self.base.layout.table if e.part is trunk and e.row.group == "embed"
        )
        rows, ids = batch.ids.unique(return_inverse=True)
        item = self.located[entry.name]
        weight = gather(self.checkpoint, item, rows.tolist())
        if adapted and self._deltas is not None:
            for slot, row in enumerate(rows.tolist()):
                own = rows_of(item, slice(row, row + 1))
                value = self._deltas.folded_into(
                    entry.name, weight[slot : slot + 1], own, torch.float32
                )
                weight[slot] = value[0]
        parent, _, leaf = entry.name.rpartition(".")
        self.modules[parent]._parameters[leaf] = nn.Parameter(weight, requires_grad=False)
        small = Packed(ids=ids, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
        return self.model.trunk.embed(small)

    @contextmanager
    def layer(self, number: int, *, adapted: bool) -> Iterator[Any]:
        """Hold the weights of a layer, with its adapter or without it.

        Yields:
            The layer, ``(x, batch) -> Tensor``.
        """
        prefix = self.layers[number]
        layer: Any = self.model.trunk.layers[number]
        for name, item in self.located.items():
            if name.startswith(f"{prefix}.") and item.tensor.row.kind is not Kind.EXPERTS:
                self._place(name, item, adapted=adapted)
        for name, module in self.model.lora_layers.items():
            if not name.startswith(f"{prefix}."):
                continue
            if isinstance(module, Experts):
                module.read_from(self._expert(self.located[name], adapted=adapted))
            if module.lora is not None and self._deltas is not None:
                a, b = self._deltas.sides(name)
                module.set_lora(a, b if adapted else torch.zeros_like(b))
        with self.model.guard(layer):
            yield layer
        for name, module in self.model.lora_layers.items():
            if name.startswith(f"{prefix}.") and isinstance(module, Experts):
                module.read_from(None)
        for part in layer.modules():
            for leaf, parameter in list(part._parameters.items()):
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    part._parameters[leaf] = nn.Parameter(empty, requires_grad=False)

    def final(self, x: Tensor, *, adapted: bool) -> Tensor:
        """What the head reads ``[T, H]``, with the adapter or without it."""
        inside = tuple(f"{prefix}." for prefix in self.layers)
        for name, parameter in self.model.named_parameters():
            rest = name != self.model.head_name and not name.startswith(inside)
            folded = self._deltas is not None and name in self._deltas.folded
            if rest and name in self.located and (parameter.is_meta or folded):
                self._place(name, self.located[name], adapted=adapted)
        return self.model.trunk.final(x)

    def head(self, x: Tensor, *, adapted: bool) -> Tensor:
        """Logits ``[n, V]`` of rows ``[n, H]``; the head is read a block of rows at a time."""
        name = self.model.head_name
        item, pieces = self.located[name], []
        for rows, block in zip(row_slices(item), blocks(self.checkpoint, item), strict=True):
            if adapted and self._deltas is not None:
                block = self._deltas.folded_into(name, block, rows_of(item, rows), torch.float32)
            pieces.append(x @ block.t())
        return torch.cat(pieces, -1)

    def _expert(self, item: Located, *, adapted: bool) -> Callable[[int], Tensor]:
        def read(number: int) -> Tensor:
            rows = slice(number, number + 1)
            value = read_tensor(self.checkpoint, item, rows).float()
            if adapted and self._deltas is not None:
                region = rows_of(item, rows)
                value = self._deltas.folded_into(item.tensor.name, value, region, torch.float32)
            return value[0]

        return read

    def _place(self, name: str, item: Located, *, adapted: bool = False) -> None:
        value = read_tensor(self.checkpoint, item).float()
        if adapted and self._deltas is not None:
            every = rows_of(item, slice(0, len(value)))
            value = self._deltas.folded_into(name, value, every, torch.float32)
        place(self.model, self.modules, item, slice(0, len(value)), value, quantize=False)
