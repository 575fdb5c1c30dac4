"""PEFT's adapter folder: its names and its config.

This file decides how a canonical weight is called in an adapter (one prefix, that of one
class) and what ``adapter_config.json`` says of an adapter that qcore trained. `adapter_reader`
meets a folder with a base; `state` writes the tensors and `merge` reads them. It needs no
torch.

Names: ``base_model.model.<module path in the class>.lora_{A,B}.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Header
from .errors import InputError, UsageError
from .locate import Layout
from .table import Namespace, Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two matrices that change one weight: ``W + scaling * B A``."""

    tensor: Tensor
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
    """

    path: Path
    pairs: Mapping[str, Pair]
    namespace: Namespace
    meta: Mapping[str, Any]
    layout: str = "peft"

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """The base's fingerprint by part, as recorded in training."""
        found = self.meta.get("fingerprints")
        return found if isinstance(found, dict) else {}


def peft_name(tensor: Tensor, namespace: Namespace, side: str) -> str:
    """The adapter's name of side ``A`` or ``B`` of a weight."""
    return f"{_PREFIX}{namespace.spell(tensor.name).removesuffix('.weight')}.lora_{side}.weight"


def choose_class(layout: Layout, part: str, classes: Sequence[str], asked: str) -> Namespace:
    """The namespace that an adapter is written in: asked for, else the checkpoint's class.

    Raises:
        UsageError: ``QC-ADAPTER-001`` for an unknown name.
        InputError: ``QC-ADAPTER-002`` when config.json names no class that the model knows.
    """
    known = layout.table.part(part).namespaces
    if asked:
        for namespace in known:
            if namespace.name == asked:
                return namespace
        names = ", ".join(namespace.name for namespace in known)
        raise UsageError(
            "QC-ADAPTER-001",
            "is not a class of this model",
            field="adapter_class",
            found=asked,
            expected=names,
            fix=f"name one of {names}",
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
    tensors: Sequence[Tensor],
    layout: Layout,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    base: str,
    revision: str | None,
    namespace: Namespace,
) -> dict[str, Any]:
    """``adapter_config.json`` for an adapter on `tensors`, as PEFT 0.21 reads it."""
    modules = {namespace.spell(tensor.name).removesuffix(".weight") for tensor in tensors}
    suffixes = sorted({name.rpartition(".")[2] for name in modules})
    hit = {
        module
        for tensor in layout.table
        if tensor.row.linear and tensor.part.loaded
        for module in [namespace.spell(tensor.name).removesuffix(".weight")]
        if module.rpartition(".")[2] in suffixes
    }
    hit |= {
        header.name
        for header in layout.carried
        if header.name.removesuffix(".weight").rpartition(".")[2] in suffixes
    }
    # Short names where they mean the same modules; else every module by its whole name.
    names = suffixes if hit == modules else sorted(modules)
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
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": names,
    }
