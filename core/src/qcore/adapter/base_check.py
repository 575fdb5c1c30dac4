"""Checks that a base has the parts, such as a vision tower, that an adapter was trained with.

This file decides what a base must have for the modalities that an adapter records
(`Adapter.modalities`): every tower that training changed, with all of its pairs, and, for a merge,
every part that training loaded. `qcore.adapter.reader` decides which pairs an adapter has.

Codes: ``QC-ADAPTER-012`` the base lacks a part, ``-013`` the number of pairs differs from training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.layout import Layout
from ..errors import InputError
from .changes import Change
from .peft_names import Adapter, flags


def check_complete(
    folder: Path, meta: Mapping[str, Any], changes: Mapping[str, Change], layout: Layout
) -> None:
    """Check that the base has every tower that training changed, with all of its pairs.

    Args:
        folder: the adapter folder, for errors.
        meta: the manifest's meta mapping.
        changes: what the folder changes, by canonical name of the weight.
        layout: the base.

    Raises:
        InputError: ``QC-ADAPTER-012`` the base lacks the tower, ``-013`` pairs are missing.
    """
    for name, record in flags(meta).items():
        trained = record.get("pairs")
        if type(trained) is not int or trained < 1:
            continue
        if not _has_part(layout, name):
            raise _missing_part(
                folder, name, record.get("plugin"), f"{trained} pairs in part '{name}'"
            )
        present = sum(change.tensor.part.name == name for change in changes.values())
        if present != trained:
            raise InputError(
                "QC-ADAPTER-013",
                f"has a different number of LoRA pairs in part '{name}' than training recorded",
                file=folder,
                field=f"modalities.{name}.pairs",
                found=present,
                expected=trained,
                fix="train or export again, or restore the folder",
            )


def _has_part(layout: Layout, name: str) -> bool:
    """Whether the table has the part and the checkpoint has its tensors."""
    return name not in layout.absent and any(part.name == name for part in layout.table.parts)


def _missing_part(adapter: Path, name: str, plugin: object, dependency: str) -> InputError:
    """Return ``QC-ADAPTER-012``: the base lacks a part that the adapter depends on.

    Args:
        adapter: the adapter folder.
        name: name of the part.
        plugin: distribution that owned the part in training, as recorded.
        dependency: what in the adapter depends on the part.
    """
    installed = f"install {plugin}, or " if isinstance(plugin, str) and plugin else ""
    return InputError(
        "QC-ADAPTER-012",
        "depends on a part that this base lacks, or that no installed plugin knows",
        file=adapter,
        field=f"part '{name}'",
        found=dependency,
        fix=f"{installed}name the base that the adapter was trained on",
    )


def refuse_parts(layout: Layout, adapter: Adapter) -> None:
    """Refuse a base that lacks a part that training loaded, before any weight is read.

    Raises:
        InputError: ``QC-ADAPTER-012`` the base lacks the part.
    """
    for name in adapter.fingerprints:
        if not _has_part(layout, name):
            plugin = adapter.modalities.get(name, {}).get("plugin")
            raise _missing_part(adapter.path, name, plugin, "it was trained with that part loaded")


def media_notes(adapter: Adapter) -> Iterator[str]:
    """Yield one line for each modality that the adapter was trained with."""
    for name, record in adapter.modalities.items():
        kinds = " and ".join(map(str, record.get("kinds") or [])) or "media of unrecorded kinds"
        changed = f"{record['pairs']} pairs change" if record.get("pairs") else "no pair changes"
        yield f"the adapter was trained on {kinds}; {changed} the part '{name}'"
