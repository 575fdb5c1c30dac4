"""Puts changes that are no plain LoRA into the weights of a layer, to verify a merge.

This file decides how base + adapter computes such a change in float32: with DoRA, the outputs of
``W x + scaling B A x`` are scaled by ``g = m / ||W + scaling B A||``, one factor for each output,
so that ``g W`` and ``g B`` take the places of W and B. `qcore.adapter.delta` computes the merge,
which `qcore.merging.streams` compares with this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapter.delta import Deltas
from ..adapter.peft_names import Adapter
from ..nn.model import Model


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

    def put(self, prefix: str) -> None:
        """Change the weights whose canonical names begin with `prefix`."""
        for name in self.adapter.folded:
            if name.startswith(prefix):
                parameter = self.model.get_parameter(name)
                self._base[name] = parameter.data
                parameter.data = self._changed(name, parameter.data)

    def restore(self) -> None:
        """Give the weights the values of the base again."""
        for name, value in self._base.items():
            self.model.get_parameter(name).data = value
        self._base.clear()

    def _changed(self, name: str, weight: Tensor) -> Tensor:
        """Return ``g W``; the LoRA layer gets ``g B``."""
        pair, magnitude = self.adapter.pairs[name], self.deltas.magnitude(name)
        assert magnitude is not None
        a, b = self.deltas.sides(name)
        norm = torch.linalg.norm(weight + pair.scaling * (b @ a), dim=1)
        factor = (magnitude / norm)[:, None]
        self.model.lora_layers[name].set_lora(a, factor * b)
        scaled: Tensor = factor * weight
        return scaled
