"""Whether a finished run is published as a success.

A run is not a success if

- the median loss of its last steps is above that of its first steps by more than their spread
  explains, or
- after at least 32 steps the median loss is at ln(vocabulary) or above: the model predicts no token
  better than chance, or
- the adapter is too small to change a weight: of every weight, the norm of the delta is below
  2^-20 of the norm of the weight, so that in bfloat16 not one value in a thousand changes.

Its checkpoint holds the adapter; ``publish_without_gain`` publishes it. Runs of few steps train on
other rows at their end than at their start, so the fewer steps, the more the loss must rise.

This file decides what counts; `stopping` decides when.

Code: ``QC-TRAIN-018``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import torch
from torch import Tensor

from ..errors import NumericError
from ..nn.model import Model
from ..nn.moe.experts import Experts
from ..nn.qlora.linear import Linear
from ..nn.qlora.lora_layer import LoraLayer
from ..nn.sharding.base import gathered_layers

_STEPS_AT_CHANCE: Final = 32
_FOR_SPREAD: Final = 8  # values of which the MAD says something
_AT_CHANCE: Final = 0.995  # of ln(vocabulary)
_ROUNDING: Final = 2.0**-20
_RMS: Final = 1.0  # a root mean square that no weight of a trained model exceeds


def loss_without_gain(
    first: Sequence[float], last: Sequence[float], steps: int, vocabulary: int
) -> str:
    """Why the losses of a run show no gain; empty if they do.

    Args:
        first: losses of the first steps.
        last: losses of the last steps, at least as many.
        steps: of the run.
        vocabulary: rows of the head.
    """
    k = min(len(first), len(last), max(1, steps // 2))
    if not k:
        return ""
    start, end = median(first[:k]), median(last[-k:])
    margin = math.log(1.1 + 6 / k)
    if k >= _FOR_SPREAD:
        # 1.2533 / sqrt(k): standard error of the median of k normal values.
        spread = max(_deviation(first[:k]), _deviation(last[-k:]))
        margin += 2 * spread * 1.2533 / math.sqrt(k)
    if end > start + 0.05 and math.log(end / max(start, 1e-9)) > margin:
        return (
            f"the run ended at a loss of {end:.4g} and began at {start:.4g} (medians of {k} steps)"
        )
    chance = math.log(vocabulary)
    if steps >= _STEPS_AT_CHANCE and end >= _AT_CHANCE * chance:
        return (
            f"the run ended at a loss of {end:.4g}, that of chance: ln({vocabulary}) is "
            f"{chance:.4g}"
        )
    return ""


def not_published(why: str, path: Path) -> NumericError:
    """The error of a run without gain.

    Args:
        why: as the functions of this file return it.
        path: the checkpoint with the adapter.
    """
    return NumericError(
        "QC-TRAIN-018",
        f"{why}; it is not published",
        file=path,
        fix="look at the adapter in this folder and at metrics.jsonl beside it; train with another "
        "learning_rate, or publish it with --resume --set publish_without_gain=true",
    )


def _deviation(values: Sequence[float]) -> float:
    """Deviation of the logarithms that their MAD stands for."""
    logs = [math.log(max(value, 1e-9)) for value in values]
    middle = median(logs)
    return median([abs(value - middle) for value in logs]) / 0.6745


@torch.no_grad()
def too_small(model: Model, start: Mapping[str, Tensor] | None) -> str:
    """Why the adapter is too small to change a weight; empty if it is not.

    Token rows and DoRA's magnitudes change weights otherwise than by a product, so a model with
    them is not judged.

    Args:
        model: the trained model.
        start: B of each weight in the initial adapter; ``None``: zero.
    """
    adapters = [*model.adapters()]
    if model.beside_adapters() or any(m.lora and m.lora.use_dora for _, m in adapters):
        return ""
    largest, where = 0.0, ""
    # Every rank has the same adapters, so all leave this loop at the same weight.
    for name, module in gathered_layers(model.sharded, dict(adapters)):
        delta = _delta_norm(module, None if start is None else start[name])
        if delta > _ROUNDING * _RMS * math.sqrt(math.prod(module.shape)):
            return ""
        share = delta / max(_weight_norm(module), 1e-30)
        if share > _ROUNDING:
            return ""
        if share >= largest:
            largest, where = share, name
    if not adapters:
        return ""
    return (
        f"the adapter is too small to change a weight: its largest delta is {largest:.1e} of the "
        f"norm of {where}"
    )


def _delta_norm(module: LoraLayer, start: Tensor | None) -> float:
    """Frobenius norm of ``s (B - start) A``."""
    assert module.lora_A is not None
    assert module.lora_B is not None
    assert module.lora is not None
    a, b = module.lora_A.detach().double(), module.lora_B.detach().double()
    if start is not None:
        b = b - start.to(b.device).double()
    if isinstance(module, Experts):
        experts = module.shape[0]
        a = a.view(experts, -1, a.shape[1])
        b = b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    square = float(((a @ a.mT) * (b.mT @ b)).sum())
    return abs(module.lora.scaling) * math.sqrt(max(square, 0.0))


def _weight_norm(module: LoraLayer) -> float:
    """Frobenius norm of the base's weight."""
    if isinstance(module, Experts):
        norms = [float(module.dense_slice(e).float().norm()) for e in range(module.shape[0])]
        return math.hypot(*norms)
    assert isinstance(module, Linear)
    return float(module.dense().float().norm())
