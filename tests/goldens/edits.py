"""Small edits from which inputs are made: rows, and changes of a model folder.

This file decides how a file is written; which rows and which changes, `inputs` and `bad_inputs`
decide.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
#: Prefix of the text model's tensors in the tiny checkpoints.
PREFIX = "model.language_model"


def conversation(question: Any, answer: Any, **more: Any) -> dict[str, Any]:
    """A row of one question and one answer; `more` goes into the message of the answer."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **more},
        ]
    }


def part(kind: str, value: str) -> dict[str, str]:
    """A part of a message: a text, or the file of an image or a video."""
    return {"type": kind, kind: value}


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """A JSON Lines file; a row that is a string is a line as it stands."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """An indented JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the config.json of a model folder."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    write_json(path, config)


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the single weights file of a model folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
