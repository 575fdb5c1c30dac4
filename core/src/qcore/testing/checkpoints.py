"""Fake model folders for tests of plugins: config and template only, or files without weights.

This file decides what a test writes in place of a model. Sizes come from the table of dtypes that
`qcore.checkpoint` reads headers with; what a checkpoint must hold is judged there.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

from ..api.views import CheckpointView, TemplateView
from ..checkpoint.chat_template import Template
from ..checkpoint.checkpoint import INDEX, SINGLE, Checkpoint
from ..checkpoint.safetensors_header import DTYPE_BITS

#: Tensor name -> shape.
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
#: Safetensors name of a dtype, for all tensors or by the name of each.
Dtype: TypeAlias = str | Callable[[str], str]


def fake_checkpoint(
    config: Mapping[str, Any], template: str | TemplateView | None = None
) -> CheckpointView:
    """A checkpoint of a config and a chat template: no tensors, no files.

    Args:
        config: config.json.
        template: Jinja source, or an object that stands for the template.
    """
    if isinstance(template, str):
        template = Template(template, "chat_template.jinja")
    checkpoint = Checkpoint(
        Path("model"), "model", None, dict(config), headers={}, shards=(), index=None, sidecars=()
    )
    # Set in place of what the property would read from files.
    checkpoint.template = cast("Template | None", template)
    return checkpoint


def write_sparse_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Shapes,
    *,
    dtype: Dtype = "BF16",
    shards: int = 1,
) -> Path:
    """Write config.json and safetensors files with true headers; every weight reads as zero.

    The data are holes of the files, so a checkpoint of any size takes no disk space.

    Args:
        folder: where; made if absent.
        config: config.json.
        shapes: the tensors.
        dtype: safetensors name of the dtype, or a function from tensor name to it.
        shards: number of files; above one with an index.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    if shards == 1:
        _write_weights(folder / SINGLE, shapes, dtype)
        return folder
    weight_map: dict[str, str] = {}
    names = list(shapes)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: shapes[name] for name in names[number::shards]}
        _write_weights(folder / file, held, dtype)
        weight_map |= dict.fromkeys(held, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return folder


def open_checkpoint(folder: Path) -> CheckpointView:
    """A model folder as hooks see it.

    Raises:
        InputError: the folder is no checkpoint; ``QC-CKPT-001`` to ``-007``.
    """
    return Checkpoint.open(folder)


def sparse_header(shapes: Shapes, dtype: Dtype = "BF16") -> tuple[bytes, int]:
    """The head of a safetensors file, and the bytes of data that it promises."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        kind = dtype if isinstance(dtype, str) else dtype(name)
        end = at + math.prod(shape) * DTYPE_BITS[kind] // 8
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, at


def _write_weights(path: Path, shapes: Shapes, dtype: Dtype) -> None:
    head, size = sparse_header(shapes, dtype)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
