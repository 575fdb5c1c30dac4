"""A part that training never loads, whose tensors are named like those of the trunk and the head.

A prediction layer that keeps its weights inside the trunk's layers is such a part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qcore import hookimpl
from qcore.api.parameters import LINEAR, Aim, Namespace, Part, Row, Table

TRUNK = "model.language_model"


def part(hidden: int, layers: int) -> Part:
    """Rows under every name that a reader of the trunk or the head could match."""
    return Part(
        name="draft", optional=True, loaded=False, section="draft_config",
        rows=(
            Row(f"{TRUNK}.layers.{{layer}}.draft.weight", "hidden hidden", "draft", kind=LINEAR),
            Row(f"{TRUNK}.layers.{{layer}}.input_layernorm.draft", "hidden", "draft"),
            Row(f"{TRUNK}.layers.{{layer}}.draft_bias", "hidden", "draft"),
            Row(f"{TRUNK}.embed_tokens.draft.weight", "draft_vocab hidden", "embed"),
            Row(f"{TRUNK}.norm.draft", "hidden", "draft"),
            Row("lm_head.draft.weight", "draft_vocab hidden", "head"),
        ),
        dims={"hidden": hidden, "draft_vocab": 32},
        axes={"layer": tuple(range(layers))},
        namespaces=(Namespace(name="vl", classes=("Qwen3_5ForConditionalGeneration",)),),
        groups={"draft": Aim.NEVER},
    )  # fmt: skip


@hookimpl
def qcore_parameters(architecture: str, config: Mapping[str, Any]) -> Iterator[Part]:
    if config.get("draft_config") is not None:
        text = config["text_config"]
        yield part(text["hidden_size"], text["num_hidden_layers"])


@hookimpl
def qcore_describe() -> Iterator[Any]:
    yield from ()


def install(folder: Path) -> Path:
    """The plugin's distribution, as an installer leaves it; the folder goes on `sys.path`."""
    info = folder / "qcore_draft-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: qcore-draft\nVersion: 1.0\n"
        "Requires-Dist: qcore-framework>=0.1,<0.2\n"
    )
    (info / "entry_points.txt").write_text(
        "[qcore.plugins]\ndraft = support.toy_draft\n"
        "[qcore.model_types]\nqwen3_5 = support.toy_draft\n"
    )
    return folder


def add(folder: Path) -> set[str]:
    """Give a tiny checkpoint the part; returns the names of its tensors."""
    config = json.loads((folder / "config.json").read_text())
    config["draft_config"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    text = config["text_config"]
    table = Table([part(text["hidden_size"], text["num_hidden_layers"])])
    for entry in table:
        tensors[entry.name] = torch.full(entry.shape, 7.0, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {entry.name for entry in table}
