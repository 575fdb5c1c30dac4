"""The adapter folder that `qcore adapter extract` publishes.

This file decides what the folder and its manifest hold: PEFT's two files, a card, the tokenizer of
the tuned checkpoint, and fingerprints of the parts of the base that the adapter depends on, so that
it binds to that base as a trained adapter does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..adapter.model_card import Card, model_card
from ..adapter.peft_config import DESCRIPTIVE
from ..adapter.peft_names import CONFIG, LAYOUT, WEIGHTS, stems, trunk_part
from ..adapter.written_config import choose_class, peft_config
from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.fingerprint import fingerprints
from ..checkpoint.hub import TOKENIZER_FILES, public_source
from ..checkpoint.identity import config_of
from ..io.artifact import publish
from ..nn.qlora.lora_layer import Lora
from ..plugins.resolve_model import Identified, classes_of
from .written_pairs import check_read_back, tensors_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractedWeight:
    """The pair of one weight.

    Attributes:
        group: group of the weight.
        lora: its rank and alpha, whose scaling is 1.
        a: ``[r, in]``; of experts ``[E r, in]``.
        b: ``[out, r]``; of experts ``[out, r E]``.
        norm: Frobenius norm of the difference of the checkpoints.
        error: Frobenius norm of what the pair leaves of it.
    """

    group: str
    lora: Lora
    a: Tensor
    b: Tensor
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        """The error over the norm."""
        return self.error / self.norm


def write_extracted(
    target: Path,
    base: Identified,
    tuned: Identified,
    weights: Mapping[str, ExtractedWeight],
    digests: Mapping[str, str],
    *,
    r: int,
    adapter_class: str,
    result: Mapping[str, Any],
) -> None:
    """Publish the adapter folder.

    Args:
        target: the folder.
        base: the base.
        tuned: the checkpoint that the adapter approximates.
        weights: the pairs by canonical name of the weight.
        digests: SHA-256 of the base's tensors, by canonical name.
        r: the requested rank.
        adapter_class: the class that the adapter is written for; empty for the base's.
        result: for the manifest.

    Raises:
        UsageError: as `choose_class`.
        NumericError: ``QC-MERGE-005`` the folder does not hold the pairs when it is read again.
        WriteError: as `publish`.
    """
    layout, checkpoint = base.layout, base.checkpoint
    table, classes = layout.table, classes_of(checkpoint.config)
    touched = {table[name].part.name for name in weights}
    namespace = choose_class(layout, touched, classes, adapter_class)
    names = stems((tensor for tensor in table if tensor.name in weights), namespace)
    source, revision = public_source(checkpoint.source, checkpoint.path, checkpoint.revision)
    config = peft_config(
        {name: weight.lora for name, weight in weights.items()},
        layout, r=r, lora_alpha=r, lora_dropout=0.0, base=source, revision=revision,
        namespace=namespace, classes=classes,
    )  # fmt: skip
    bound = {trunk_part(table).name, *touched}
    with publish(target, kind="adapter") as out:
        out.write_bytes(WEIGHTS, save(tensors_of(weights, names), metadata={"format": "pt"}))
        out.write_json(CONFIG, config, editable=DESCRIPTIVE)
        tokenizer = _tokenizer_files(tuned.checkpoint)
        for name in tokenizer:
            out.copy(name, tuned.checkpoint.file(name))
        out.write_text("README.md", _card(config, weights, "tokenizer_config.json" in tokenizer))
        own = {name: sha for name, sha in digests.items() if table[name].part.name in bound}
        out.meta.update(
            verb="extract",
            model=base.provenance(),
            tuned=tuned.provenance(),
            layout=LAYOUT,
            adapter_class={"name": namespace.name, "classes": list(namespace.classes)},
            fingerprints=fingerprints(layout, own),
            tensors=own,
            config=config_of(base.checkpoint.config),
            result=dict(result),
        )
        check_read_back(base, out.folder, weights)


def _tokenizer_files(checkpoint: Checkpoint) -> list[str]:
    names = checkpoint.sidecars
    return [name for name in names if any(fnmatch(name, each) for each in TOKENIZER_FILES)]


def _card(
    config: Mapping[str, Any], weights: Mapping[str, ExtractedWeight], tokenizer: bool
) -> str:
    card = Card(
        base=config["base_model_name_or_path"],
        revision=config["revision"],
        class_name=(config["auto_mapping"] or {}).get("base_model_class", ""),
        ranks=frozenset(weight.lora.r for weight in weights.values()),
        groups=Counter(weight.group for weight in weights.values()),
        variables={},
        tokenizer=tokenizer,
        made="extracted with qcore from a tuned checkpoint",
    )
    return model_card(card)
