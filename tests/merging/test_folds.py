"""Changed weights outside the layers: each is put into the model once, by its whole name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from qcore.merging.folds import Folds


class Model(nn.Module):
    """Two parameters, of which the name of one begins with that of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0]), requires_grad=False)
        self.scale_of_rows = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.lora_layers: dict[str, nn.Module] = {}


def test_the_base_comes_back_where_a_name_begins_with_another() -> None:
    model = Model()
    names = frozenset(("scale", "scale_of_rows"))
    adapter: Any = SimpleNamespace(folded=names, pairs={})
    folds = Folds(cast(Any, model), adapter, cast(Any, None))
    folds.value = lambda name, weight, region: weight * 10  # type: ignore[method-assign]
    base = folds.put_all(names)
    assert {name: float(value) for name, value in base.items()} == {"scale": 1, "scale_of_rows": 2}
    assert [float(p) for p in model.parameters()] == [10.0, 20.0]
    folds.restore()
    assert [float(p) for p in model.parameters()] == [1.0, 2.0]
