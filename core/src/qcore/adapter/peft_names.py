"""Names of LoRA tensors in a PEFT adapter, by class; writes adapter_config.json.

This file decides how a canonical weight is called in an adapter (one prefix, that of one
class) and what ``adapter_config.json`` says of an adapter that qcore trained. `adapter_reader`
meets a folder with a base; `state` writes the tensors and `merge` reads them. It needs no
torch.

Names: ``base_model.model.<module path in the class>.lora_{A,B}.weight``. Several parts may be
touched (the trunk, a tower): the class is then one that each of them knows, and each spells its
own weights by its own prefixes of that class. A row's kind decides the rest: which module that
is, the shapes, and whether the config lists it among ``target_modules`` or ``target_parameters``
(PEFT 0.21, ``tuners/lora/layer.py``, ``ParamWrapper``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..api.parameters import Kind, Namespace, Part, Table
from ..api.parameters import Tensor as TableTensor
from ..checkpoint.checkpoint import Header
from ..checkpoint.layout import Layout
from ..errors import InputError, UsageError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: How qcore's adapters are laid out, as their manifest records it: names and shapes as PEFT
#: 0.21 has them, A of experts expert-major, B rank-major, the first stack innermost.
LAYOUT = "peft-0.21"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two matrices that change one weight: ``W + scaling * B A``; of a stack, each slice.

    Attributes:
        tensor: the weight.
        a: ``[r, in]``; of experts ``[E r, in]``, row ``e r + k`` is expert e's.
        b: ``[out, r]``; of experts ``[out, r E]``, column ``k E + e`` is expert e's.
        r: rank, of experts each one's.
        scaling: factor of the product.
    """

    tensor: TableTensor
    a: Header
    b: Header
    r: int
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter folder explained by a base's layout.

    Attributes:
        path: the folder.
        pairs: by canonical name of the weight.
        namespace: the class prefix that it is written in.
        meta: what qcore recorded in its manifest; empty for a foreign adapter.
        layout: ``peft``, or the foreign layout that a plugin read it as.
        trunk: name of the base's part that is no tower.
    """

    path: Path
    pairs: Mapping[str, Pair]
    namespace: Namespace
    meta: Mapping[str, Any]
    layout: str = "peft"
    trunk: str = "text"

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """The base's fingerprint by part, as recorded in training."""
        found = self.meta.get("fingerprints")
        return found if isinstance(found, dict) else {}

    @property
    def parts(self) -> frozenset[str]:
        """Names of the parts that its pairs change."""
        return frozenset(pair.tensor.part.name for pair in self.pairs.values())

    def binding(self, layout: Layout) -> dict[str, str]:
        """Recorded fingerprints of the parts that a run computes with: loaded ones, and its own.

        A tower that was frozen in training and that the run leaves idle binds nothing.
        """
        mine = self.parts | {part.name for part in layout.table.parts if layout.loads(part)}
        return {part: sha256 for part, sha256 in self.fingerprints.items() if part in mine}

    @property
    def modalities(self) -> dict[str, dict[str, Any]]:
        """Which towers it was trained with, as recorded; of a foreign adapter, as its pairs tell.

        By part: ``kinds`` of media that its rows had, ``keys`` of their own that parts of a kind
        had, ``tower_changed``, ``pairs`` in the tower, and the ``plugin`` that owns it.
        """
        if "modalities" in self.meta:
            return flags(self.meta)
        found: dict[str, dict[str, Any]] = {}
        for pair in self.pairs.values():
            part = pair.tensor.part
            if part.name != self.trunk:
                one = {
                    "kinds": [], "keys": {}, "tower_changed": True, "pairs": 0,
                    "plugin": part.owner,
                }  # fmt: skip
                found.setdefault(part.name, one)["pairs"] += 1
        return found

    def keys_of(self, kind: str) -> list[str]:
        """Keys that media of a kind had in training, by which they were read otherwise."""
        found: set[str] = set()
        for one in self.modalities.values():
            keys = one.get("keys")
            of_kind = keys.get(kind) if isinstance(keys, dict) else None
            found |= {str(key) for key in of_kind} if isinstance(of_kind, list) else set()
        return sorted(found)


def flags(meta: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a manifest records of modalities, as far as it has their form."""
    found = meta.get("modalities")
    if not isinstance(found, dict):
        return {}
    return {name: dict(one) for name, one in found.items() if isinstance(one, dict)}


def trunk_part(table: Table) -> Part:
    """The part that owns the head; of a table without one, the first that may be loaded."""
    heads = (tensor.part for tensor in table if tensor.row.group == "head")
    return next(heads, next((part for part in table.parts if part.loaded), table.parts[0]))


def namespace_of(part: Part, name: str) -> Namespace | None:
    """A part's own namespace of that name; ``None``: its modules are not in that class."""
    return next((one for one in part.namespaces if one.name == name), None)


def spell(tensor: TableTensor, namespace: Namespace) -> str:
    """A weight's name in a class, by the prefixes that its own part has there.

    One whose part is not in the class is called as it is on the hub.
    """
    own = namespace_of(tensor.part, namespace.name)
    return tensor.name if own is None else own.spell(tensor.name)


def stems(tensors: Iterable[TableTensor], namespace: Namespace) -> dict[str, str]:
    """The adapter's name of each weight, by canonical name, less ``.lora_{A,B}.weight``.

    Experts' matrices hang on the module that holds the stacks. Where several stacks of one
    module are adapted, PEFT wraps it once for each, in the order of its parameters: the first
    is the innermost, each further one puts a ``base_layer`` in the others' names.
    """
    found: dict[str, str] = {}
    stacks: dict[str, list[TableTensor]] = {}
    for tensor in tensors:
        name = spell(tensor, namespace)
        if tensor.row.kind is Kind.EXPERTS:
            stacks.setdefault(name.rpartition(".")[0], []).append(tensor)
        else:
            found[tensor.name] = _PREFIX + name.removesuffix(".weight")
    for module, mine in stacks.items():
        for depth, tensor in enumerate(reversed(mine)):
            found[tensor.name] = _PREFIX + module + ".base_layer" * depth
    return found


def peft_shapes(tensor: TableTensor, r: int) -> dict[str, tuple[int, int]]:
    """Shapes of sides ``A`` and ``B``; of experts, r is each one's."""
    if tensor.row.kind is Kind.EXPERTS:
        experts, out, into = tensor.shape
        return {"A": (experts * r, into), "B": (out, r * experts)}
    out, into = tensor.shape
    return {"A": (r, into), "B": (out, r)}


def target_name(tensor: TableTensor, namespace: Namespace) -> str:
    """What PEFT's config calls it: the module of a linear map, else the parameter."""
    name = spell(tensor, namespace)
    return name.removesuffix(".weight") if tensor.row.kind is Kind.LINEAR else name


def choose_class(
    layout: Layout, touched: Collection[str], classes: Sequence[str], asked: str
) -> Namespace:
    """The trunk's namespace that an adapter is written in: asked for, else the checkpoint's class.

    Args:
        layout: the base.
        touched: names of the parts that LoRA hits; each must be in the class.
        classes: ``architectures`` of config.json.
        asked: a namespace's name; empty: the one of `classes`.

    Raises:
        UsageError: ``QC-ADAPTER-001`` for an unknown name, or for a class without a touched part.
        InputError: ``QC-ADAPTER-002`` when config.json names no class that the model knows.
    """
    table = layout.table
    parts = [part for part in table.parts if part.name in touched]
    every = trunk_part(table).namespaces
    known = [one for one in every if all(namespace_of(part, one.name) for part in parts)]
    names = ", ".join(namespace.name for namespace in known)
    if asked:
        for namespace in known:
            if namespace.name == asked:
                return namespace
        without = [part.name for part in parts if namespace_of(part, asked) is None]
        there = any(one.name == asked for one in every)
        raise UsageError(
            "QC-ADAPTER-001",
            f"has no part '{without[0]}', which this run trains"
            if there
            else "is not a class of this model",
            field="adapter_class",
            found=asked,
            expected=names,
            fix=f"name one of {names}" if names else "train fewer groups",
        )
    for namespace in known:
        if set(namespace.classes) & set(classes):
            return namespace
    expected = ", ".join(name for namespace in known for name in namespace.classes)
    raise InputError(
        "QC-ADAPTER-002",
        "names no class of this model",
        file="config.json",
        field="architectures",
        found=list(classes),
        expected=expected,
        fix=f"pass --adapter-class {'|'.join(namespace.name for namespace in known)}",
    )


def peft_config(
    chosen: Mapping[str, Numbers],
    layout: Layout,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    base: str,
    revision: str | None,
    namespace: Namespace,
) -> dict[str, Any]:
    """``adapter_config.json`` for an adapter, as PEFT 0.21 reads it.

    Args:
        chosen: the numbers of each adapted weight, by canonical name.
        layout: the base.
        r: rank of the weights that have none of their own.
        lora_alpha: alpha of the weights that have none of their own.
        lora_dropout: of all.
        base: what the user named.
        revision: its commit on the hub.
        namespace: the class that the adapter is written for.
    """
    tensors = [layout.table[name] for name in chosen]
    modules = [tensor for tensor in tensors if tensor.row.kind is Kind.LINEAR]
    parameters = [tensor for tensor in tensors if tensor.row.kind is not Kind.LINEAR]
    ranks = {tensor.name: chosen[tensor.name].r for tensor in tensors}
    alphas = {tensor.name: chosen[tensor.name].lora_alpha for tensor in tensors}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": _pattern(tensors, namespace, ranks, r),
        "alpha_pattern": _pattern(tensors, namespace, alphas, lora_alpha),
        "target_modules": _module_names(modules, layout, namespace),
        "target_parameters": _parameter_names(parameters, layout, namespace) or None,
    }


class Numbers(Protocol):
    """What a config says of one adapted weight."""

    @property
    def r(self) -> int:
        """Rank."""
        ...

    @property
    def lora_alpha(self) -> float:
        """Alpha."""
        ...


def _module_names(modules: list[TableTensor], layout: Layout, namespace: Namespace) -> list[str]:
    """Short names where they mean the same modules; else every module by its whole name."""
    wanted = {target_name(tensor, namespace) for tensor in modules}
    suffixes = sorted({name.rpartition(".")[2] for name in wanted})
    # PEFT looks at every module, a tower's convolution too, whoever owns it and trained or not.
    every = [spell(tensor, namespace) for tensor in layout.table if tensor.part.loaded]
    every += [header.name for header in layout.carried]
    there = (name.removesuffix(".weight") for name in every if name.endswith(".weight"))
    hit = {name for name in there if name.rpartition(".")[2] in suffixes}
    return suffixes if hit == wanted else sorted(wanted)


def _parameter_names(
    parameters: list[TableTensor], layout: Layout, namespace: Namespace
) -> list[str]:
    """Names below the layer where they mean the same parameters; else every whole name."""
    wanted = {target_name(tensor, namespace) for tensor in parameters}
    shorts = {_short(tensor, namespace) for tensor in parameters}
    hit = {
        name
        for tensor in layout.table
        if tensor.row.kind is not None and tensor.part.loaded
        for name in [spell(tensor, namespace)]
        if any(name == short or name.endswith(f".{short}") for short in shorts)
    }
    return sorted(shorts if hit == wanted else wanted)


def _short(tensor: TableTensor, namespace: Namespace) -> str:
    """A target's name below its layer, which all layers share: ``mlp.experts.down_proj``."""
    words = target_name(tensor, namespace).split(".")
    index = max((n for n, word in enumerate(words) if word.isdigit()), default=-1)
    return ".".join(words[index + 1 :])


def _pattern(
    tensors: list[TableTensor], namespace: Namespace, values: Mapping[str, float], default: float
) -> dict[str, float]:
    """Numbers unlike the default by target, short where all of that name share the number."""
    by_name: dict[str, set[float]] = {}
    for tensor in tensors:
        by_name.setdefault(_short(tensor, namespace), set()).add(values[tensor.name])
    found = {}
    for tensor in tensors:
        short = _short(tensor, namespace)
        name = short if len(by_name[short]) == 1 else target_name(tensor, namespace)
        if values[tensor.name] != default or name != short:
            found[name] = values[tensor.name]
    return found
