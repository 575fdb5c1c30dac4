"""The base that ``adapter_config.json`` names, and whether its generation is that of this base.

Generations of a model share their shapes, so an adapter of one merges into the other without an
error and changes it at random. This file decides what the name of a base says of its generation:
what the SKU record of that name says, else the version in the name, if the records of the detected
generation are named in the same way. A name that says nothing is not held against the adapter. It
concerns adapters without a fingerprint of their base; a fingerprint proves more than a name.

Codes: ``QC-ADAPTER-009`` the adapter has no fingerprint, and `trust_base` is not set; ``-015`` it
names a base of another generation, and `trust_generation` is not set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import TrustError
from ..skus.records import Sku
from ..skus.registry import Skus, load_skus
from .peft_names import CONFIG

FIELD = "base_model_name_or_path"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What a verb knows of the base that it uses.

    Attributes:
        generation: name of its generation.
        source: the folder or hub id that the user passed.
    """

    generation: str
    source: str


def base_name(config: Mapping[str, Any]) -> str:
    """Return the base that adapter_config.json names; empty if it names none."""
    name = config.get(FIELD)
    return name.strip() if isinstance(name, str) and name.strip() not in ("N/A", ".") else ""


def check_consent(folder: Path, config: Mapping[str, Any], base: Base | None, trust: bool) -> None:
    """Refuse an adapter without a fingerprint of its base, unless the user trusts it.

    Args:
        folder: the adapter folder.
        config: content of adapter_config.json.
        base: the base of the verb; ``None`` if it is not known.
        trust: the user's consent.

    Raises:
        TrustError: ``QC-ADAPTER-009``.
    """
    if trust:
        return
    name = base_name(config)
    found = f"{FIELD} {name}" if name else f"no {FIELD}"
    other = generation_of(name, load_skus(), base.generation) if base and name else None
    if base is not None and other not in (None, base.generation):
        found += f", of generation {other}; this base is of generation {base.generation}"
    raise TrustError(
        "QC-ADAPTER-009",
        "carries no fingerprint of the base that it was trained on",
        file=folder,
        found=found,
        fix="pass --trust-base if you know that this is its base",
    )


def check_generation(folder: Path, config: Mapping[str, Any], base: Base, trust: bool) -> list[str]:
    """Compare the base that a trusted adapter names with the base of the verb.

    Args:
        folder: the adapter folder.
        config: content of adapter_config.json.
        base: the base of the verb.
        trust: the user's consent to another generation.

    Returns:
        Lines for the report.

    Raises:
        TrustError: ``QC-ADAPTER-015`` the name is of another generation, without consent.
    """
    name = base_name(config)
    if not name:
        return []
    skus = load_skus()
    other = generation_of(name, skus, base.generation)
    if other not in (None, base.generation):
        if not trust:
            raise TrustError(
                "QC-ADAPTER-015",
                "names a base of another generation",
                file=folder / CONFIG,
                field=FIELD,
                found=f"{name}, of generation {other}",
                expected=f"a base of generation {base.generation}, as {base.source}",
                fix=f"name {name} as the base, or pass --trust-generation if you know that the "
                "adapter was trained on this one",
            )
        return [
            f"warning: {CONFIG} names {name}, of generation {other}: the adapter is trusted to be "
            f"for {base.source}, of generation {base.generation}"
        ]
    mine, theirs = skus.find(base.source), skus.find(name)
    if mine is not None and theirs is not None and mine.id != theirs.id:
        return [
            f"warning: {CONFIG} names {name}: the adapter is trusted to be for {base.source} "
            "nevertheless"
        ]
    return [f"{CONFIG} names {name} as the adapter's base"]


def generation_of(name: str, skus: Skus, expected: str) -> str | None:
    """Return the generation that the name of a base says; ``None`` if it says none.

    Args:
        name: a hub id, or a path.
        skus: the installed records.
        expected: name of the detected generation; a version in a name counts only where the
            records of this generation have theirs in their names.
    """
    last = _last(name)
    if (sku := skus.find(last)) is not None:
        return sku.generation
    without_dot = {sku.generation.replace(".", ""): sku.generation for sku in skus}
    found = {
        without_dot.get(match[1], match[1].replace("_", "."))
        for family in _families(skus, expected)
        for match in re.finditer(
            rf"(?<![a-z0-9]){re.escape(family)}[-_ ]?(\d+(?:[._]\d+)?)(?![a-z0-9])(?!\.\d)", last
        )
    }
    return found.pop() if len(found) == 1 else None


def _last(name: str) -> str:
    """Return the part of a name that names the model: of a hub cache, that before ``snapshots``."""
    parts = PurePosixPath(name.replace("\\", "/").lower()).parts
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rpartition("--")[2]
    return parts[-1].partition("@")[0] if parts else ""


def _families(skus: Iterable[Sku], generation: str) -> set[str]:
    """Return what precedes the generation in the names of its records, such as ``llama``."""
    families = set()
    for sku in skus:
        family, version, _ = sku.id.lower().rpartition("/")[2].partition(generation)
        if sku.generation == generation and version and re.fullmatch(r"[a-z]+", family):
            families.add(family)
    return families
