"""The adapter folder that `qcore adapter combine` publishes.

This file decides what the folder and its manifest hold: PEFT's two files, a card, the tokenizer
where the adapters bring the same one, the sources with their weights and hashes, and what all of
them record of their base. A sum has a fingerprint of its base only if each of its adapters has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..adapter.combined import Weighted
from ..adapter.model_card import Card, model_card
from ..adapter.peft_config import DESCRIPTIVE
from ..adapter.peft_names import CONFIG, LAYOUT, WEIGHTS, Adapter, stems
from ..adapter.weight_files import weights_digest
from ..adapter.written_config import choose_class, peft_config
from ..api.parameters import Namespace
from ..checkpoint.hub import TOKENIZER_FILES, public_source
from ..io.artifact import Writer
from ..nn.qlora.lora_layer import Lora
from ..plugins.resolve_model import Identified, classes_of
from .written_pairs import tensors_of


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinedWeight:
    """The pair of one weight.

    Attributes:
        group: group of the weight.
        r: rank; of experts, of each expert.
        a: ``[r, in]``; of experts ``[E r, in]``.
        b: ``[out, r]``; of experts ``[out, r E]``.
        norm: Frobenius norm of the sum.
        error: Frobenius norm of what the pair leaves of it; 0 for the exact sum.
    """

    group: str
    r: int
    a: Tensor
    b: Tensor
    norm: float
    error: float

    @property
    def lora(self) -> Lora:
        """Rank and alpha, whose scaling is 1."""
        return Lora(r=self.r, lora_alpha=self.r)

    @property
    def relative_error(self) -> float:
        """The error over the norm."""
        return self.error / self.norm if self.norm else 0.0


def write_combined(
    out: Writer,
    base: Identified,
    adapters: Sequence[Weighted],
    total: Adapter,
    weights: Mapping[str, CombinedWeight],
    adapter_class: str,
    result: Mapping[str, Any],
) -> None:
    """Write the files of the folder.

    Args:
        out: the folder.
        base: the base.
        adapters: the adapters of the sum.
        total: their sum.
        weights: the pairs by canonical name of the weight.
        adapter_class: the class that the adapter is written for; empty for that of the adapters.
        result: for the manifest.

    Raises:
        UsageError: as `choose_class`.
    """
    layout, classes = base.layout, classes_of(base.checkpoint.config)
    namespace = _namespace(base, adapters, weights, adapter_class)
    names = stems((tensor for tensor in layout.table if tensor.name in weights), namespace)
    source = base.checkpoint
    name, revision = public_source(source.source, source.path, source.revision)
    ranks = [weight.r for weight in weights.values()]
    usual = max(set(ranks), key=ranks.count)
    config = peft_config(
        {weight: pair.lora for weight, pair in weights.items()},
        layout, r=usual, lora_alpha=usual, lora_dropout=0.0, base=name, revision=revision,
        namespace=namespace, classes=classes,
    )  # fmt: skip
    out.write_bytes(WEIGHTS, save(tensors_of(weights, names), metadata={"format": "pt"}))
    out.write_json(CONFIG, config, editable=DESCRIPTIVE)
    tokenizer = _tokenizer(adapters)
    for file in tokenizer.values():
        out.copy(file.name, file)
    card = Card(
        base=name,
        revision=revision,
        class_name=(config["auto_mapping"] or {}).get("base_model_class", ""),
        ranks=frozenset(ranks),
        groups=Counter(pair.group for pair in weights.values()),
        variables={},
        tokenizer="tokenizer_config.json" in tokenizer,
        made="combined with qcore from several adapters",
    )
    out.write_text("README.md", model_card(card))
    out.meta.update(
        verb="combine",
        model=base.provenance(),
        layout=LAYOUT,
        adapter_class={"name": namespace.name, "classes": list(namespace.classes)},
        combined=[_source(own) for own in adapters],
        **_recorded(adapters, total),
        result=dict(result),
    )


def _namespace(
    base: Identified,
    adapters: Sequence[Weighted],
    weights: Mapping[str, CombinedWeight],
    asked: str,
) -> Namespace:
    """The requested class; else that of the adapters, if it is one; else that of the base."""
    own = {one.adapter.namespace.name for one in adapters}
    touched = {base.layout.table[name].part.name for name in weights}
    name = asked or (own.pop() if len(own) == 1 else "")
    return choose_class(base.layout, touched, classes_of(base.checkpoint.config), name)


def _source(own: Weighted) -> dict[str, Any]:
    """What the manifest records of one adapter."""
    adapter = own.adapter
    return {
        "adapter": adapter.source or str(adapter.path),
        "weight": own.weight,
        "revision": adapter.revision,
        "layout": adapter.layout,
        "sha256": weights_digest(adapter.path),
    }


def _recorded(adapters: Sequence[Weighted], total: Adapter) -> dict[str, Any]:
    """What the adapters record of their base and of their rows, where they agree."""
    meta: dict[str, Any] = {}
    if all(own.adapter.fingerprints for own in adapters):
        fields = ("fingerprints", "tensors", "config")
        meta |= {field: total.meta[field] for field in fields if field in total.meta}
    chats = [own.adapter.meta.get("chat") for own in adapters]
    if chats[0] and all(chat == chats[0] for chat in chats):
        meta["chat"] = chats[0]
    towers = total.modalities
    return meta | ({"modalities": towers} if towers else {})


def _tokenizer(adapters: Sequence[Weighted]) -> dict[str, Path]:
    """The tokenizer files by name, if all adapters that have any have the same."""
    brought = [found for own in adapters if (found := dict(_files(own.adapter.path)))]
    contents = [{name: path.read_bytes() for name, path in own.items()} for own in brought]
    return brought[0] if brought and all(own == contents[0] for own in contents) else {}


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch(path.name, each) for each in TOKENIZER_FILES):
            yield path.name, path
