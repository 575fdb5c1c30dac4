"""Training state: what a checkpoint holds beside the adapter, and whether it may be resumed.

This file decides that a resumed run is the run that was stopped: base, template, data,
settings and plugins are compared and a change is refused by name. State is safetensors and
JSON, never a pickle. Order, schedule and random numbers are functions of the step
(`schedule`), so the step, the adapter and AdamW's moments are all there is.

A run's folder lies beside its output: ``OUTPUT.run/`` holds ``metrics.jsonl`` and
``checkpoint-N/``, each a complete adapter artefact with state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from .adapter import WEIGHTS
from .artifact import Writer, publish, read_manifest, remove_tree, verify
from .errors import InputError
from .model import Model

OPTIMIZER = "optimizer.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")


def run_folder(output: Path) -> Path:
    """Where a run that writes `output` keeps its checkpoints and metrics."""
    return output.with_name(output.name + ".run")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def write_optimizer(out: Writer, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """AdamW's moments by parameter name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.trainable():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}:{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    out.write_bytes(OPTIMIZER, save(tensors))


def newest(folder: Path) -> tuple[int, Path] | None:
    """The newest checkpoint that verifies; damaged ones are passed over."""
    for step, path in reversed(checkpoints(folder)):
        if verify(path).ok:
            return step, path
    return None


def restore(
    path: Path, model: Model, optimizer: torch.optim.Optimizer, names: Mapping[str, str]
) -> None:
    """Put a checkpoint's adapter and moments back.

    Args:
        path: the checkpoint.
        model: with adapters on the run's device.
        optimizer: AdamW over `Model.trainable`.
        names: the adapter file's name of each trainable parameter.
    """
    weights, moments = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
    for name, parameter in model.trainable():
        with torch.no_grad():
            parameter.copy_(weights[names[name]])
        state = optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            value = moments[f"{name}:{key}"]
            # AdamW keeps its step counter on the CPU unless it is fused.
            where = parameter.device if key != "step" or optimizer.defaults.get("fused") else "cpu"
            state[key] = value.to(where)


def check_same(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to resume what is not the same run.

    Raises:
        InputError: ``QC-RESUME-002`` naming the first thing that changed.
    """
    before = read_manifest(path).meta.get("identity", {})
    for key, now in _flat(identity).items():
        then = _flat(before).get(key)
        if then != now:
            raise InputError(
                "QC-RESUME-002",
                "changed since the run was stopped",
                file=path,
                field=key,
                found=now,
                expected=then,
                fix="restore it, or start a new run with another --output",
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def rotate(folder: Path, keep: int) -> None:
    """Delete old checkpoints; called only after the newest is durable."""
    for _, path in checkpoints(folder)[:-keep]:
        remove_tree(path)


__all__ = [
    "check_same", "checkpoints", "newest", "publish", "restore", "rotate", "run_folder",
    "write_optimizer",
]  # fmt: skip
