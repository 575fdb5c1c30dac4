"""Checks that a base has every part, such as a vision tower, that an adapter was trained on.

This file decides what of an adapter's recorded modalities (`Adapter.modalities`) a base must answer
to: a tower that training changed is there with all of its pairs, and to be merged into, one that
training loaded is there at all. Which pairs there are is `adapter_reader`'s.

Codes: ``QC-ADAPTER-012`` a part that is not here, ``-013`` another number of pairs than trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.layout import Layout
from ..errors import InputError
from .peft_names import Adapter, Pair, flags


def check_complete(
    folder: Path, meta: Mapping[str, Any], pairs: Mapping[str, Pair], layout: Layout
) -> None:
    """Every tower that training changed is here, with all of its pairs.

    Raises:
        InputError: ``QC-ADAPTER-012``, ``-013``.
    """
    for name, one in flags(meta).items():
        trained = one.get("pairs")
        if type(trained) is not int or trained < 1:
            continue
        if not _has_part(layout, name):
            raise _no_part(folder, name, one.get("plugin"), f"{trained} pairs in part '{name}'")
        here = sum(pair.tensor.part.name == name for pair in pairs.values())
        if here != trained:
            raise InputError(
                "QC-ADAPTER-013",
                f"does not hold what training changed in part '{name}'",
                file=folder,
                field=f"modalities.{name}.pairs",
                found=here,
                expected=trained,
                fix="train or export again, or restore the folder",
            )


def _has_part(layout: Layout, name: str) -> bool:
    """Whether a table has that part, and the checkpoint its tensors."""
    return name not in layout.absent and any(part.name == name for part in layout.table.parts)


def _no_part(adapter: Path, name: str, plugin: object, found: str) -> InputError:
    """``QC-ADAPTER-012``: a base without a part that an adapter depends on.

    Args:
        adapter: its folder.
        name: of the part.
        plugin: the distribution that owned it in training, as recorded.
        found: what depends on it.
    """
    installed = f"install {plugin}, or " if isinstance(plugin, str) and plugin else ""
    return InputError(
        "QC-ADAPTER-012",
        "depends on a part that this base lacks, or that no installed plugin knows",
        file=adapter,
        field=f"part '{name}'",
        found=found,
        fix=f"{installed}name the base that the adapter was trained on",
    )


def refuse_parts(layout: Layout, adapter: Adapter) -> None:
    """Refuse a base without a part that training loaded, before anything is read.

    Raises:
        InputError: ``QC-ADAPTER-012``.
    """
    for name in adapter.fingerprints:
        if not _has_part(layout, name):
            plugin = adapter.modalities.get(name, {}).get("plugin")
            raise _no_part(adapter.path, name, plugin, "it was trained with that part loaded")


def media_notes(adapter: Adapter) -> Iterator[str]:
    """What of the adapter is not text."""
    for name, one in adapter.modalities.items():
        kinds = " and ".join(map(str, one.get("kinds") or [])) or "no media that it tells of"
        changed = f"{one['pairs']} pairs change" if one.get("pairs") else "no pair changes"
        yield f"the adapter was trained on {kinds}; {changed} the part '{name}'"
