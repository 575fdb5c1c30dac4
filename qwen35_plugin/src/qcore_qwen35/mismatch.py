"""Refuses MLX exports and checkpoints whose tensors are of another model than config.json says.

Without these checks, the parameter table would report hundreds of missing, unknown or misshapen
tensors. A few tensors that decide the question are checked first:

- ``QC-QWEN35-004`` an MLX export, which `mlx_export` recognizes by its values.
- ``QC-QWEN35-005`` config.json and tensors of two models: dense and mixture of experts, two numbers
  of experts, or more prediction layers than config.json declares.

Prediction layers that config.json does not declare are refused too: no library that reads the
checkpoint by its config would run them, and nothing shows whether they fit the trunk.
`qcore.checkpoint.layout` reports everything finer (a missing expert, a shape).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcore.errors import InputError

from . import mlx_export
from .table import prediction_layers, text_config

if TYPE_CHECKING:
    from qcore.api import CheckpointView, Header

_LAYER = re.compile(r"mtp\.layers\.(\d{1,9})\.")


def refuse(checkpoint: CheckpointView, *, moe: bool) -> None:
    """Refuse tensors of another model; `moe` is True for a ``model_type`` with experts.

    Raises:
        InputError: the codes above, and ``QC-QWEN35-001`` an invalid number of layers.
    """
    mlx_export.refuse(checkpoint)
    _feed_forward(checkpoint, moe)
    _prediction(checkpoint)


def _feed_forward(checkpoint: CheckpointView, moe: bool) -> None:
    """Compare dense layers, experts and their number with the config, by the first such layer."""
    headers = checkpoint.headers
    router = _first(headers, ".mlp.gate.weight")
    dense = None if router else _first(headers, ".mlp.gate_proj.weight")
    if moe and dense:
        raise _mismatch("model_type", "a mixture of experts", f"the dense {dense}")
    if router and not moe:
        raise _mismatch("model_type", "a dense model", f"the router {router}")
    experts = text_config(checkpoint.config).get("num_experts")
    if router and type(experts) is int and headers[router].shape[:1] != (experts,):
        rows = headers[router].shape[0] if headers[router].shape else 0
        raise _mismatch("num_experts", str(experts), f"{router} has {rows} rows")


def _prediction(checkpoint: CheckpointView) -> None:
    """Refuse more prediction layers than config.json declares; core reports fewer."""
    names = [name for name in checkpoint.headers if name.startswith("mtp.")]
    claimed = prediction_layers(text_config(checkpoint.config))
    for name in names:
        layer = _LAYER.match(name)
        if not claimed or (layer and int(layer[1]) >= claimed):
            value = text_config(checkpoint.config).get("mtp_num_hidden_layers", "nothing")
            raise _mismatch("mtp_num_hidden_layers", str(value), name)


def _first(headers: Mapping[str, Header], ending: str) -> str | None:
    return next((name for name in headers if name.endswith(ending) and ".layers." in name), None)


def _mismatch(field: str, says: str, there: str) -> InputError:
    return InputError(
        "QC-QWEN35-005",
        f"declares {says}, but the tensors belong to another model",
        file="config.json",
        field=field,
        found=there,
        expected="config.json and tensors of the same model",
        fix="use the config.json that came with the weights",
    )
