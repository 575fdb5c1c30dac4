"""What an adapter folder holds, from its config and headers alone, without a base.

This file decides how the tensors of an adapter are sorted when no base is known: LoRA pairs with
their rank and scaling, saved weights, token rows. The matrices of experts name their module, not
their stack, so their rank follows from the config only where all stacks have one rank.
`qcore.adapter.reader` matches the folder with a base; `qcore.adapter.norms` reads values. It
imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..checkpoint.checkpoint import Header, read_json, safe_file
from ..errors import InputError, QcoreError
from .locate import locate_adapter
from .number_patterns import NumberPatterns
from .peft_config import check_config
from .peft_names import CONFIG
from .weight_files import adapter_headers
from .wrapped_names import plain_name

_PREFIX: Final = "base_model.model."
_LORA: Final = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.[^.]+)?(\.weight)?"
)
_MAGNITUDE: Final = ".lora_magnitude_vector"
_ROWS: Final = ".trainable_tokens_delta"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePair:
    """The two matrices of one module.

    Attributes:
        module: name of the module without PEFT's prefix.
        a: ``[r, in]``; of a stack of experts ``[E r, in]``.
        b: ``[out, r]``; of a stack of experts ``[out, r E]``.
        r: rank; ``None`` if it cannot be known without the base.
        experts: number of experts; 1 for a single matrix.
        scaling: factor of the product; ``None`` if the rank or alpha is not known.
    """

    module: str
    a: Header
    b: Header
    r: int | None
    experts: int
    scaling: float | None

    @property
    def target(self) -> str:
        """The name below the layer, such as ``self_attn.q_proj``."""
        words = self.module.split(".")
        index = max((n for n, word in enumerate(words) if word.isdigit()), default=-1)
        return ".".join(words[index + 1 :])

    @property
    def parameters(self) -> int:
        """Number of elements of both matrices."""
        return self.a.numel + self.b.numel


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """An adapter folder without its base.

    Attributes:
        path: the folder.
        source: the folder or hub id that the user passed.
        revision: the commit on the hub; ``None`` for a local folder.
        config: content of adapter_config.json.
        headers: all tensors, by name without wrappers.
        pairs: the LoRA pairs by module.
        magnitudes: DoRA's vectors.
        rows: trained rows (``trainable_token_indices``) by module.
        saved: the other tensors, such as those of ``modules_to_save``, and LoRA matrices without
            their partner.
        refused: why qcore does not use the adapter, as far as the config says it.
    """

    path: Path
    source: str
    revision: str | None
    config: Mapping[str, Any]
    headers: Mapping[str, Header]
    pairs: Mapping[str, FilePair]
    magnitudes: tuple[Header, ...]
    rows: Mapping[str, Header]
    saved: tuple[Header, ...]
    refused: tuple[QcoreError, ...]


def read_contents(adapter: str | Path) -> Contents:
    """Read the config and the headers of an adapter.

    Args:
        adapter: the folder, or its hub id (`qcore.adapter.locate`).

    Raises:
        InputError: as `locate_adapter` and `adapter_headers`; ``QC-CKPT-002`` the config is not
            JSON.
    """
    located = locate_adapter(adapter)
    folder = located.path
    config = read_json(safe_file(folder, CONFIG))
    headers = {plain_name(header.name): header for header in adapter_headers(folder)}
    sides: dict[str, dict[str, Header]] = {}
    magnitudes, rows, rest = [], {}, []
    for name, header in headers.items():
        match = _LORA.fullmatch(name)
        if match is not None:
            sides.setdefault(_module(match["module"]), {})[match["side"]] = header
        elif _MAGNITUDE in name:
            magnitudes.append(header)
        elif name.endswith(_ROWS):
            rows[_module(name.removesuffix(_ROWS).removesuffix(".token_adapter"))] = header
        else:
            rest.append(header)
    whole = {module: found for module, found in sides.items() if len(found) == 2}
    rest += [h for module, found in sides.items() if module not in whole for h in found.values()]
    refused = check_config(folder / CONFIG, config)
    numbers = None
    if not refused:
        try:
            numbers = NumberPatterns(folder / CONFIG, config, [*whole])
        except InputError as error:
            refused.append(error)
    return Contents(
        path=folder,
        source=located.source,
        revision=located.revision,
        config=config,
        headers=headers,
        pairs={m: _pair(m, found["A"], found["B"], config, numbers) for m, found in whole.items()},
        magnitudes=tuple(magnitudes),
        rows=rows,
        saved=tuple(rest),
        refused=tuple(refused),
    )


def _module(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _pair(
    module: str, a: Header, b: Header, config: Mapping[str, Any], numbers: NumberPatterns | None
) -> FilePair:
    r: int | None = None
    experts = 1
    flat = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1]
    if flat and _is_stack(module, config):
        # A key of the patterns may name a stack of the module, which the tensors do not.
        rank = config.get("r") if not config.get("rank_pattern") else None
        if type(rank) is int and rank > 0 and a.shape[0] % rank == 0:
            r, experts = rank, a.shape[0] // rank
    elif flat:
        r = a.shape[0]
    scaling = None
    known = experts == 1 or not config.get("alpha_pattern")
    if r is not None and numbers is not None and known:
        alpha = numbers.value("alpha_pattern", module, float(config["lora_alpha"]))
        scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return FilePair(module=module, a=a, b=b, r=r, experts=experts, scaling=scaling)


def _is_stack(module: str, config: Mapping[str, Any]) -> bool:
    """Whether the config targets a parameter of the module, as PEFT does for stacks of experts."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return any(
        f".{module}".endswith(f".{name.rpartition('.')[0]}") for name in target_parameters(config)
    )


def target_parameters(config: Mapping[str, Any]) -> list[str]:
    """Return the names in ``target_parameters`` that name a module."""
    names = config.get("target_parameters")
    if not isinstance(names, list):
        return []
    return [name for name in names if isinstance(name, str) and "." in name]


def config_differences(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields of two configs that differ; lists of names are compared as sets.

    A field that is absent equals one that is ``null``, false or empty.
    """
    for field in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(field), other.get(field)
        if _canonical(mine) != _canonical(theirs):
            yield field, mine, theirs


def _canonical(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return sorted(set(value)) or None
    return None if value is False or value in ({}, []) else value
