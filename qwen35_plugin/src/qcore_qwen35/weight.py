"""A tensor under a name of its own, used by the module that owns it."""

from __future__ import annotations

from torch import nn


class Weight(nn.Module):
    """``conv1d.weight``, ``q_norm.weight``: the name is a module's, the use its owner's."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
