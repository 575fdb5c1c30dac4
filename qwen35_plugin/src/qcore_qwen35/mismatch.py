"""What the headers show to be another model than config.json says, told in one line.

Each of these would otherwise come out of the table as hundreds of tensors that are missing,
unknown or misshapen. So they are looked for first, by a few names that decide them:

- ``QC-QWEN35-004`` an MLX export. It is no renaming: its convolutions lie ``[C, 4, 1]`` and
  one is added to its zero-centred norms, so under other names it would load and compute
  ``1 + (1 + w)``.
- ``QC-QWEN35-005`` config.json and tensors of two models: dense and a mixture of experts, two
  numbers of experts, more prediction layers than config.json says.

Prediction layers of which config.json says nothing are refused too: nothing that reads the
checkpoint by its config would run them, and whether they fit the trunk nobody has said.
Everything finer (a missing expert, a shape) is `qcore.checkpoint.layout`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcore.errors import InputError

from .table import prediction_layers, text_config

if TYPE_CHECKING:
    from qcore.api import CheckpointView, Header

_LAYER = re.compile(r"mtp\.layers\.(\d{1,9})\.")


def refuse(checkpoint: CheckpointView, *, moe: bool) -> None:
    """Raise what the headers show; `moe` is what the ``model_type`` says.

    Raises:
        InputError: the codes above, and ``QC-QWEN35-001`` a number of layers that is none.
    """
    _mlx(checkpoint)
    _feed_forward(checkpoint, moe)
    _prediction(checkpoint)


def _mlx(checkpoint: CheckpointView) -> None:
    """MLX's names, or its convolutions where somebody gave the tensors the hub's names back."""
    for name, header in checkpoint.headers.items():
        transposed = name.endswith(".linear_attn.conv1d.weight") and header.shape[2:] == (1,)
        renamed = name.startswith("language_model.model.") or ".mlp.switch_mlp." in name
        if transposed or renamed:
            raise InputError(
                "QC-QWEN35-004",
                "is an MLX export: its norms are shifted and its convolutions turned",
                file=checkpoint.source,
                field=name,
                found=list(header.shape),
                expected="the names and layouts of the original checkpoint",
                fix="name the checkpoint that it was converted from",
            )


def _feed_forward(checkpoint: CheckpointView, moe: bool) -> None:
    """Dense maps or experts, and how many: as the first layer that has any shows."""
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
    """More prediction layers than config.json says; fewer is a part that is there in part."""
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
        f"says {says}, and the tensors are of another model",
        file="config.json",
        field=field,
        found=there,
        expected="config.json and tensors of one model",
        fix="use the config.json that came with the weights",
    )
