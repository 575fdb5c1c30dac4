"""PEFT's names for LoRA tensors, by model class, and the record of an adapter that was read.

This file decides the name of a canonical weight in an adapter: all names have the prefix of one
model class. `qcore.adapter.reader` matches an adapter folder with a base,
`qcore.adapter.written_config` decides the config of an adapter that qcore writes. It imports no
torch.

Names: ``base_model.model.<module path in the class>.lora_{A,B}.weight``. If LoRA is applied to
several parts (the trunk, a tower), each of them must have the class, and each spells its weights
with its own prefixes of that class. The kind of a row decides the rest: the module, the shapes,
and whether the config lists the weight in ``target_modules`` or ``target_parameters`` (PEFT 0.21,
``tuners/lora/layer.py``, ``ParamWrapper``).

Shapes: E experts, r rank of one LoRA pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api.parameters import Kind, Namespace, Part, Table
from ..api.parameters import Tensor as TableTensor
from ..checkpoint.layout import Layout
from .changes import Change, Pair

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: Layout of qcore's adapters, recorded in their manifest: names and shapes of PEFT 0.21; for
#: experts, A is expert-major and B rank-major, and the first stack of a module is innermost.
LAYOUT = "peft-0.21"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter folder, matched with the layout of its base.

    Attributes:
        path: the folder.
        changes: what the adapter changes, by canonical name of the weight.
        namespace: the class whose prefix the tensor names have.
        meta: what qcore recorded in the manifest; empty for an adapter of another program.
        layout: ``peft``, or the name of the layout that a plugin recognized.
        trunk: name of the trunk's part; all other parts are towers.
        notes: lines for the report about how the files were read.
        source: the folder or hub id that the user passed.
        revision: the commit on the hub; ``None`` for a local folder.
        untied: whether the head of a tied base gets other values than the embedding.
        vocabulary: rows of embedding and head, if the adapter has more of them than the base.
    """

    path: Path
    changes: Mapping[str, Change]
    namespace: Namespace
    meta: Mapping[str, Any]
    layout: str = "peft"
    trunk: str = "text"
    notes: tuple[str, ...] = ()
    source: str = ""
    revision: str | None = None
    untied: bool = False
    vocabulary: int | None = None

    @property
    def pairs(self) -> Mapping[str, Pair]:
        """The LoRA pairs, by canonical name of the weight."""
        return {name: c for name, c in self.changes.items() if isinstance(c, Pair)}

    @property
    def lora(self) -> Mapping[str, Pair]:
        """The pairs that are computed beside the frozen weight, as in training."""
        return {name: pair for name, pair in self.pairs.items() if pair.is_lora}

    @property
    def folded(self) -> frozenset[str]:
        """Names of the weights whose change is added to the weight before it is used."""
        return frozenset(self.changes.keys() - self.lora.keys())

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprints of the base by part, as recorded in training."""
        fingerprints = self.meta.get("fingerprints")
        return fingerprints if isinstance(fingerprints, dict) else {}

    @property
    def base_config(self) -> Mapping[str, Any] | None:
        """config.json of the base, as training recorded it in the identity of the run.

        An adapter that no run trained has it beside its fingerprints; ``None`` in adapters of
        other programs and of earlier builds.
        """
        identity = self.meta.get("identity")
        recorded = (identity if isinstance(identity, dict) else self.meta).get("config")
        return recorded if isinstance(recorded, dict) else None

    @property
    def parts(self) -> frozenset[str]:
        """Names of the parts that the adapter changes."""
        return frozenset(change.tensor.part.name for change in self.changes.values())

    def binding(self, layout: Layout) -> dict[str, str]:
        """Return the recorded fingerprints that the base of a run must match.

        These are the fingerprints of the parts that the run loads and of the parts that the pairs
        change. A tower that was frozen in training and is not loaded now is not compared.

        Args:
            layout: the base of the run.
        """
        mine = self.parts | {part.name for part in layout.table.parts if layout.loads(part)}
        return {part: sha256 for part, sha256 in self.fingerprints.items() if part in mine}

    @property
    def modalities(self) -> dict[str, dict[str, Any]]:
        """The towers that the adapter was trained with, as recorded or derived from its pairs.

        By part: ``kinds`` of media in the rows, ``keys`` of media by kind that change how media
        are read, ``tower_changed``, the number of ``pairs`` (and saved weights) in the tower, and
        the ``plugin`` that owns it. They are derived from the changes if the manifest does not
        record them.
        """
        if "modalities" in self.meta:
            return flags(self.meta)
        modalities: dict[str, dict[str, Any]] = {}
        for change in self.changes.values():
            part = change.tensor.part
            if part.name != self.trunk:
                modality = {
                    "kinds": [], "keys": {}, "tower_changed": True, "pairs": 0,
                    "plugin": part.owner,
                }  # fmt: skip
                modalities.setdefault(part.name, modality)["pairs"] += 1
        return modalities

    def keys_of(self, kind: str) -> list[str]:
        """Return the keys that media of a kind had in training and that change how they are read.

        Args:
            kind: kind of media, such as ``image``.
        """
        names: set[str] = set()
        for modality in self.modalities.values():
            keys = modality.get("keys")
            of_kind = keys.get(kind) if isinstance(keys, dict) else None
            names |= {str(key) for key in of_kind} if isinstance(of_kind, list) else set()
        return sorted(names)


def flags(meta: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the modalities that a manifest records; malformed entries are left out."""
    modalities = meta.get("modalities")
    if not isinstance(modalities, dict):
        return {}
    return {
        name: dict(modality) for name, modality in modalities.items() if isinstance(modality, dict)
    }


def trunk_part(table: Table) -> Part:
    """Return the part that owns the head; without a head, the first part that can be loaded."""
    heads = (tensor.part for tensor in table if tensor.row.group == "head")
    return next(heads, next((part for part in table.parts if part.loaded), table.parts[0]))


def namespace_of(part: Part, name: str) -> Namespace | None:
    """Return the namespace of a part by name; ``None`` if the class does not have the part."""
    return next((namespace for namespace in part.namespaces if namespace.name == name), None)


def spell(tensor: TableTensor, namespace: Namespace) -> str:
    """Return the name of a weight in a class, with the prefix that its part has there.

    A weight whose part is not in the class keeps its canonical name.
    """
    own = namespace_of(tensor.part, namespace.name)
    return tensor.name if own is None else own.spell(tensor.name)


def stems(tensors: Iterable[TableTensor], namespace: Namespace) -> dict[str, str]:
    """Return the adapter names of weights without ``.lora_{A,B}.weight``, by canonical name.

    The matrices of experts belong to the module that holds the stacks. If several stacks of a
    module have LoRA, PEFT wraps the module once for each, in the order of its parameters: the
    first is innermost, and each further wrapper adds a ``base_layer`` to the names of the others.

    Args:
        tensors: all weights that have LoRA; the names of stacks depend on each other.
        namespace: the class that the adapter is written for.
    """
    names: dict[str, str] = {}
    stacks: dict[str, list[TableTensor]] = {}
    for tensor in tensors:
        name = spell(tensor, namespace)
        if tensor.row.kind is Kind.EXPERTS:
            stacks.setdefault(name.rpartition(".")[0], []).append(tensor)
        else:
            names[tensor.name] = _PREFIX + name.removesuffix(".weight")
    for module, tensors_of_module in stacks.items():
        for depth, tensor in enumerate(reversed(tensors_of_module)):
            names[tensor.name] = _PREFIX + module + ".base_layer" * depth
    return names


def peft_shapes(tensor: TableTensor, r: int, *, older: bool = False) -> dict[str, tuple[int, int]]:
    """Return the shapes of sides ``A`` and ``B``; for experts, r is the rank of each expert.

    Args:
        tensor: the weight.
        r: rank.
        older: for experts, the layout of PEFT before 0.19.1.
    """
    if tensor.row.kind is Kind.EXPERTS:
        experts, out, into = tensor.shape
        if older:
            out, into = into, out
        return {"A": (experts * r, into), "B": (out, r * experts)}
    out, into = tensor.shape
    return {"A": (r, into), "B": (out, r)}


def target_name(tensor: TableTensor, namespace: Namespace) -> str:
    """Return the name of a weight in PEFT's config: that of its module, or of a bare parameter."""
    name = spell(tensor, namespace)
    return name.removesuffix(".weight") if tensor.row.kind in (Kind.LINEAR, None) else name
