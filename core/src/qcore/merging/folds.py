"""Puts changes that are no plain LoRA into the weights of a layer, to verify a merge.

This file decides how base + adapter computes such a change in float32. With DoRA, the outputs of
``W x + scaling B A x`` are scaled by ``g = m / ||W + scaling B A||``, one factor for each output,
so that ``g W`` and ``g B`` take the places of W and B. Saved values take the place of a weight.
LoRA on the embedding or the head is added in float32. `qcore.adapter.delta` computes the merge,
which `qcore.merging.streams` compares with this.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ..adapter.changes import Replacement
from ..adapter.delta import Deltas
from ..adapter.peft_names import Adapter
from ..api.parameters import Region
from ..nn.model import Model
from ..nn.moe.experts import Experts


class Folds:
    """The folded changes of an adapter, in the weights of some layers at a time.

    Args:
        model: the model, float32, whose layers are in memory while they are used.
        adapter: the adapter.
        deltas: its matrices.
    """

    def __init__(self, model: Model, adapter: Adapter, deltas: Deltas) -> None:
        self.model, self.adapter, self.deltas = model, adapter, deltas
        self._base: dict[str, Tensor] = {}
        self._readers: dict[str, Callable[[int], Tensor] | None] = {}

    def put(self, prefix: str) -> None:
        """Change the weights whose canonical names begin with `prefix`."""
        self.put_all([name for name in self.adapter.folded if name.startswith(prefix)])

    def put_all(self, names: Collection[str]) -> dict[str, Tensor]:
        """Change these weights; returns the values of the base."""
        for name in names:
            holder = self.model.lora_layers.get(name)
            if isinstance(holder, Experts):
                self._readers[name] = holder.reader
                holder.read_from(self._expert(name, holder.reader))
                continue
            parameter = self.model.get_parameter(name)
            self._base[name] = parameter.data
            parameter.data = self._changed(name, parameter.data)
        return dict(self._base)

    def restore(self) -> None:
        """Give the weights the values of the base again."""
        for name, value in self._base.items():
            self.model.get_parameter(name).data = value
        for name, reader in self._readers.items():
            holder = self.model.lora_layers[name]
            assert isinstance(holder, Experts)
            holder.read_from(reader)
        self._base.clear()
        self._readers.clear()

    def value(self, name: str, weight: Tensor, region: Region) -> Tensor:
        """Return the weight of base + adapter, float32, for a change outside the linear maps.

        Args:
            name: canonical name of the tensor.
            weight: ``tensor[region]`` of the base, float32.
            region: slices of the canonical tensor, one for each dimension.
        """
        change = self.adapter.changes[name]
        if isinstance(change, Replacement):
            return torch.cat([total for _, total in self.deltas.add(name, weight, region)]).float()
        a, b = self.deltas.sides(name)
        rows = region[0]
        whole = self.deltas.below(name, weight, region).float() + change.scaling * (b[rows] @ a)
        magnitude = self.deltas.magnitude(name)
        if magnitude is not None:
            whole *= (magnitude[rows] / torch.linalg.norm(whole, dim=1))[:, None]
        return whole

    def _expert(self, name: str, reader: Callable[[int], Tensor] | None) -> Callable[[int], Tensor]:
        """Return a reader of the saved values of one expert."""
        assert reader is not None

        def read(expert: int) -> Tensor:
            weight = reader(expert)
            region = (slice(expert, expert + 1), *(slice(0, n) for n in weight.shape))
            return self.value(name, weight[None], region)[0]

        return read

    def _changed(self, name: str, weight: Tensor) -> Tensor:
        """Return saved values; or ``g W`` for DoRA, where the LoRA layer gets ``g B``."""
        if name not in self.adapter.pairs:
            return self.value(name, weight, tuple(slice(0, n) for n in weight.shape))
        pair, magnitude = self.adapter.pairs[name], self.deltas.magnitude(name)
        assert magnitude is not None
        a, b = self.deltas.sides(name)
        norm = torch.linalg.norm(weight + pair.scaling * (b @ a), dim=1)
        factor = (magnitude / norm)[:, None]
        self.model.lora_layers[name].set_lora(a, factor * b)
        scaled: Tensor = factor * weight
        return scaled
