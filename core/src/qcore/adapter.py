"""PEFT's adapter folder: its names and its config.

This file decides how a canonical weight is called in an adapter (one prefix, that of one
class) and what ``adapter_config.json`` says of an adapter that qcore trained. `adapter_reader`
meets a folder with a base; `state` writes the tensors and `merge` reads them. It needs no
torch.

Names: ``base_model.model.<module path in the class>.lora_{A,B}.weight``. A row's kind decides
the rest: which module that is, the shapes, and whether the config lists it among
``target_modules`` or ``target_parameters`` (PEFT 0.21, ``tuners/lora/layer.py``,
``ParamWrapper``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .checkpoint import Header
from .errors import InputError, UsageError
from .locate import Layout
from .table import Kind, Namespace, Tensor

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


def stems(tensors: Iterable[Tensor], namespace: Namespace) -> dict[str, str]:
    """The adapter's name of each weight, by canonical name, less ``.lora_{A,B}.weight``.

    Experts' matrices hang on the module that holds the stacks. Where several stacks of one
    module are adapted, PEFT wraps it once for each, in the order of its parameters: the first
    is the innermost, each further one puts a ``base_layer`` in the others' names.
    """
    found: dict[str, str] = {}
    stacks: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        name = namespace.spell(tensor.name)
        if tensor.row.kind is Kind.EXPERTS:
            stacks.setdefault(name.rpartition(".")[0], []).append(tensor)
        else:
            found[tensor.name] = _PREFIX + name.removesuffix(".weight")
    for module, mine in stacks.items():
        for depth, tensor in enumerate(reversed(mine)):
            found[tensor.name] = _PREFIX + module + ".base_layer" * depth
    return found


def peft_shapes(tensor: Tensor, r: int) -> dict[str, tuple[int, int]]:
    """Shapes of sides ``A`` and ``B``; of experts, r is each one's."""
    if tensor.row.kind is Kind.EXPERTS:
        experts, out, into = tensor.shape
        return {"A": (experts * r, into), "B": (out, r * experts)}
    out, into = tensor.shape
    return {"A": (r, into), "B": (out, r)}


def target_name(tensor: Tensor, namespace: Namespace) -> str:
    """What PEFT's config calls it: the module of a linear map, else the parameter."""
    name = namespace.spell(tensor.name)
    return name.removesuffix(".weight") if tensor.row.kind is Kind.LINEAR else name


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


def _module_names(modules: list[Tensor], layout: Layout, namespace: Namespace) -> list[str]:
    """Short names where they mean the same modules; else every module by its whole name."""
    wanted = {target_name(tensor, namespace) for tensor in modules}
    suffixes = sorted({name.rpartition(".")[2] for name in wanted})
    hit = {
        name
        for tensor in layout.table
        if tensor.row.kind is Kind.LINEAR and tensor.part.loaded
        for name in [target_name(tensor, namespace)]
        if name.rpartition(".")[2] in suffixes
    }
    hit |= {
        header.name
        for header in layout.carried
        if header.name.removesuffix(".weight").rpartition(".")[2] in suffixes
    }
    return suffixes if hit == wanted else sorted(wanted)


def _parameter_names(parameters: list[Tensor], layout: Layout, namespace: Namespace) -> list[str]:
    """Names below the layer where they mean the same parameters; else every whole name."""
    wanted = {target_name(tensor, namespace) for tensor in parameters}
    shorts = {_short(tensor, namespace) for tensor in parameters}
    hit = {
        name
        for tensor in layout.table
        if tensor.row.kind is not None and tensor.part.loaded
        for name in [namespace.spell(tensor.name)]
        if any(name == short or name.endswith(f".{short}") for short in shorts)
    }
    return sorted(shorts if hit == wanted else wanted)


def _short(tensor: Tensor, namespace: Namespace) -> str:
    """A target's name below its layer, which all layers share: ``mlp.experts.down_proj``."""
    words = target_name(tensor, namespace).split(".")
    index = max((n for n, word in enumerate(words) if word.isdigit()), default=-1)
    return ".".join(words[index + 1 :])


def _pattern(
    tensors: list[Tensor], namespace: Namespace, values: Mapping[str, float], default: float
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
