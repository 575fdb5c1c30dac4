"""Records which experts a MoE router picks for each token while a merge is verified.

Rounding may send a token to another expert, so `verify` compares only tokens with the same route.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..nn.moe.experts import Experts, Routing


@contextmanager
def routes(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Record the experts ``[T, k]`` of each token, for every stack of experts that runs."""
    picked: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, Routing]) -> None:
        picked.append(inputs[1].chosen.sort(1).values)

    hooks = [m.register_forward_pre_hook(record) for m in layer.modules() if isinstance(m, Experts)]
    try:
        yield picked
    finally:
        for hook in hooks:
            hook.remove()


def moved(first: list[Tensor], second: list[Tensor]) -> Tensor | None:
    """Tokens ``[T]`` whose experts differ between two runs; ``None`` without experts.

    Args:
        first: of ``T`` tokens, by stack.
        second: of the same tokens, which other tokens may follow.
    """
    if not first:
        return None
    unlike = [(a != b[: len(a)]).any(1) for a, b in zip(first, second, strict=True)]
    return torch.stack(unlike).any(0)
