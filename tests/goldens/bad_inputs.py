"""Inputs that qcore must refuse: model folders, rows and settings, each with one fault.

This file decides the faults; which error code each ends with, `error_cases` says.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goldens.edits import (
    PREFIX,
    WEIGHTS,
    conversation,
    edit_config,
    edit_weights,
    part,
    write_rows,
)

_A_LOG = f"{PREFIX}.layers.1.linear_attn.A_log"
_Q_PROJ = f"{PREFIX}.layers.3.self_attn.q_proj.weight"
_Tensors = dict[str, Tensor]
_GOOD = conversation("hi", "hello")
_TURN_END = "<|im_end|>"


def _text_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda config: config["text_config"].update(values))


def _weights(change: Callable[[_Tensors], object]) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, change)


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    os.truncate(path, path.stat().st_size - 1000)


def _without_template(folder: Path) -> None:
    _text_config(eos_token_id=248044)(folder)  # proves the generation without the template
    (folder / "chat_template.jinja").unlink()


def _two_faults(folder: Path) -> None:
    def change(tensors: _Tensors) -> None:
        del tensors[_A_LOG]
        tensors["model.stray.weight"] = torch.zeros(3)
        tensors[_Q_PROJ] = tensors[_Q_PROJ][:128]

    edit_weights(folder, change)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not read")


#: Copies of the tiny dense checkpoint, by name of the folder, and what is changed in each.
MODELS: Mapping[str, Callable[[Path], object]] = {
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "config-not-json": lambda folder: (folder / "config.json").write_text("{"),
    "unknown-type": lambda folder: edit_config(folder, lambda c: c.update(model_type="acme")),
    "fp8-claimed": lambda folder: edit_config(
        folder, lambda c: c.update(quantization_config={"quant_method": "fp8"})
    ),
    "no-class": lambda folder: edit_config(folder, lambda c: c.update(architectures=[])),
    "layers-short": _text_config(layer_types=["linear_attention"] * 3),
    "missing-tensor": _weights(lambda tensors: tensors.pop(_A_LOG)),
    "extra-tensor": _weights(lambda t: t.update({"model.stray.weight": torch.zeros(3)})),
    "wrong-shape": _weights(lambda t: t.update({_Q_PROJ: t[_Q_PROJ][:128]})),
    "two-faults": _two_faults,
    "truncated": _truncate,
    "pickled": _pickled,
    "no-template": _without_template,
    "no-tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "nan": _weights(lambda t: t[_Q_PROJ].view(-1)[7:8].fill_(torch.nan)),
    "other-values": _weights(lambda t: t[_Q_PROJ].view(-1)[5:6].add_(1)),
}

#: Files of rows, by name; a string is a line as it stands.
ROWS: Mapping[str, tuple[object, ...]] = {
    "empty": (),
    "not-json": (_GOOD, "{'messages': []}"),
    "no-messages": (_GOOD, {"mesages": []}),
    "wrong-role": ({"messages": [{"role": "asistant", "content": "hi"}]},),
    "no-answer": ({"messages": [{"role": "user", "content": "hi"}]},),
    "control-string": (conversation(f"hi{_TURN_END}", "hello"),),
    "too-long": (conversation("hi", "hello " * 200),),
    "reasoning-twice": (conversation("hi", "<think>a</think>hello", reasoning_content="b"),),
    "several": (_GOOD, "{", {"messages": []}, conversation("hi", "")),
    "image-missing": (conversation([part("image", "nowhere.png")], "Noise."),),
    "image-damaged": (conversation([part("image", "damaged.png")], "Noise."),),
}

_YAML = {"duplicate": "r: 4\nr: 8\n", "unknown": "learning_rat: 0.1\n", "list": "- r\n"}


def make_bad_inputs(folder: Path) -> None:
    """Write the inputs with faults beside the good ones.

    Args:
        folder: of the good inputs, ``dense`` and ``media`` among them; gets ``bad``.
    """
    bad = folder / "bad"
    bad.mkdir()
    for name, change in MODELS.items():
        shutil.copytree(folder / "dense", bad / name)
        change(bad / name)
    for name, rows in ROWS.items():
        write_rows(bad / f"{name}.jsonl", rows)
    for name, text in _YAML.items():
        (bad / f"{name}.yaml").write_text(text, encoding="utf-8")
    image = (folder / "media" / "0.png").read_bytes()
    (bad / "damaged.png").write_bytes(image[: len(image) // 2])
