"""The adapter_config.json of an adapter that qcore writes, and the class that it is written for.

This file decides which class's names the adapter has, and what ``adapter_config.json`` contains so
that stock PEFT applies the adapter or raises. `qcore.adapter.peft_config` decides what qcore reads.
It imports no torch.

Codes: ``QC-ADAPTER-001`` not a class of this model, ``-002`` config.json names no class of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from ..api.parameters import Kind, Namespace
from ..api.parameters import Tensor as TableTensor
from ..checkpoint.layout import Layout
from ..errors import InputError, UsageError
from .peft_names import namespace_of, target_name, trunk_part

#: Version of PEFT in adapter_config.json: it decides how the matrices of experts are read.
PEFT_VERSION = "0.21.0"


def choose_class(
    layout: Layout, touched: Collection[str], classes: Sequence[str], asked: str
) -> Namespace:
    """Choose the class that an adapter is written for: the requested one, else the checkpoint's.

    Args:
        layout: the base.
        touched: names of the parts that LoRA is applied to; the class must have each of them.
        classes: ``architectures`` of config.json.
        asked: name of the requested namespace; empty for the one of `classes`.

    Returns:
        The trunk's namespace of that class.

    Raises:
        UsageError: ``QC-ADAPTER-001`` the name is unknown, or the class lacks a part in `touched`.
        InputError: ``QC-ADAPTER-002`` config.json names no class of the model.
    """
    table = layout.table
    parts = [part for part in table.parts if part.name in touched]
    every = trunk_part(table).namespaces
    known = [
        namespace
        for namespace in every
        if all(namespace_of(part, namespace.name) for part in parts)
    ]
    names = ", ".join(namespace.name for namespace in known)
    if asked:
        for namespace in known:
            if namespace.name == asked:
                return namespace
        without = [part.name for part in parts if namespace_of(part, asked) is None]
        exists = any(namespace.name == asked for namespace in every)
        raise UsageError(
            "QC-ADAPTER-001",
            f"has no part '{without[0]}', which this run trains"
            if exists
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
    classes: Sequence[str] = (),
    token_ids: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``, as PEFT 0.21 reads it.

    PEFT only warns about tensors that fit no module of the model, but raises if no target is in
    the model. So targets are full module names, which the other class of a model does not have,
    and ``auto_mapping`` names the class. PEFT ignores it where ``task_type`` is set.

    Args:
        chosen: the numbers of each weight that has LoRA, by canonical name.
        layout: the base.
        r: default rank; other ranks go into ``rank_pattern``.
        lora_alpha: default alpha; other values go into ``alpha_pattern``.
        lora_dropout: dropout of all weights.
        base: the base as the user named it.
        revision: commit of the base on the hub; ``None`` for a folder.
        namespace: the class that the adapter is written for.
        classes: ``architectures`` of config.json.
        token_ids: rows that the adapter replaces, by canonical name of the embedding or the head.
    """
    tensors = [layout.table[name] for name in chosen]
    modules = [tensor for tensor in tensors if tensor.row.kind is Kind.LINEAR]
    parameters = [tensor for tensor in tensors if tensor.row.kind is not Kind.LINEAR]
    ranks = {tensor.name: chosen[tensor.name].r for tensor in tensors}
    alphas = {tensor.name: chosen[tensor.name].lora_alpha for tensor in tensors}
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        **_auto_class(namespace, classes),
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "bias": "none",
        "use_rslora": any(numbers.use_rslora for numbers in chosen.values()),
        "use_dora": any(numbers.use_dora for numbers in chosen.values()),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        **_token_rows(layout, namespace, token_ids or {}),
        "rank_pattern": _pattern(tensors, namespace, ranks, r),
        "alpha_pattern": _pattern(tensors, namespace, alphas, lora_alpha),
        "target_modules": sorted(target_name(tensor, namespace) for tensor in modules),
        "target_parameters": sorted(target_name(tensor, namespace) for tensor in parameters)
        or None,
    }


def _token_rows(
    layout: Layout, namespace: Namespace, token_ids: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return ``trainable_token_indices``: a list means the embedding, and a head tied to it."""
    ids = {name: list(rows) for name, rows in token_ids.items() if rows}
    if not ids:
        return {}
    if [layout.table[name].row.group for name in ids] == ["embed"]:
        return {"trainable_token_indices": next(iter(ids.values()))}
    modules = {
        target_name(layout.table[name], namespace).removesuffix(".weight").rpartition(".")[2]: rows
        for name, rows in ids.items()
    }
    return {"trainable_token_indices": modules}


def _auto_class(namespace: Namespace, classes: Sequence[str]) -> dict[str, Any]:
    """Return the fields from which PEFT's Auto classes pick the class of the base."""
    own = [name for name in classes if name in namespace.classes] or list(namespace.classes)
    if not own:
        return {"task_type": "CAUSAL_LM", "auto_mapping": None}
    mapping = {"base_model_class": own[0], "parent_library": "transformers"}
    return {"task_type": None, "auto_mapping": mapping}


class Numbers(Protocol):
    """Rank, alpha and scaling rule of one weight that has LoRA."""

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling is rank-stabilized; the same for all weights of an adapter."""
        ...

    @property
    def use_dora(self) -> bool:
        """Whether rows have magnitudes; the same for all weights of an adapter."""
        ...

    @property
    def r(self) -> int:
        """Rank."""
        ...

    @property
    def lora_alpha(self) -> float:
        """Alpha."""
        ...


def _short(tensor: TableTensor, namespace: Namespace) -> str:
    """Return a target's name below its layer, such as ``mlp.experts.down_proj``."""
    words = target_name(tensor, namespace).split(".")
    index = max((n for n, word in enumerate(words) if word.isdigit()), default=-1)
    return ".".join(words[index + 1 :])


def _pattern(
    tensors: list[TableTensor], namespace: Namespace, values: Mapping[str, float], default: float
) -> dict[str, float]:
    """Return the values that differ from the default, by target.

    A short name is used if all targets with that short name have the same value.
    """
    by_name: dict[str, set[float]] = {}
    for tensor in tensors:
        by_name.setdefault(_short(tensor, namespace), set()).add(values[tensor.name])
    pattern = {}
    for tensor in tensors:
        short = _short(tensor, namespace)
        name = short if len(by_name[short]) == 1 else target_name(tensor, namespace)
        if values[tensor.name] != default or name != short:
            pattern[name] = values[tensor.name]
    return pattern
