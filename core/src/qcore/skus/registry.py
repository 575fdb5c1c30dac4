"""Looks up installed SKU records (facts about published models) by name, alias or hub id.

Plugins provide records through the entry-point group ``qcore.skus`` (name -> package, files
``<package>/skus/*.yaml``), which is read without importing the plugin. This file decides that
names match in any case, with or without the organization, and that a model that is served by API
only is refused before it is searched on the hub. `qcore.config.registry` decides what happens if
two plugins provide the same name; `qcore.skus.records` defines a record.

Codes: ``QC-SKU-001`` no record of that name, ``-002`` a record of a broken file, ``-003`` a
name that two plugins claim, ``-005`` a model without weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

from ..config.registry import Kind, Registry, load
from ..errors import InputError
from ..io.entry_points import SKUS
from .file import read_skus
from .records import Sku, spellings

KIND = Kind(
    noun="SKU record",
    group=SKUS,
    folder="skus",
    field="ID",
    listing="qcore skus list",
    unknown="QC-SKU-001",
    broken="QC-SKU-002",
    contested="QC-SKU-003",
    spellings=spellings,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skus(Registry[Sku]):
    """All installed records."""

    kind: ClassVar[Kind] = KIND

    def refuse_hosted(self, model: str) -> None:
        """Refuse a model that is served by API only.

        Args:
            model: the name that the user passed; ``@REVISION`` and a provider's ``:VARIANT`` are
                ignored.

        Raises:
            InputError: ``QC-SKU-005``.
        """
        sku = self.find(re.split("[@:]", model)[0])
        if sku is None or not sku.hosted:
            return
        providers = ", ".join(dict.fromkeys(offer.provider for offer in sku.served))
        raise InputError(
            "QC-SKU-005",
            f"is served by API only ({providers}): there are no weights to inspect, train, merge "
            "or generate with",
            file=model,
            expected=f"an open model of generation {sku.generation}",
            fix=f"name {' or '.join(sku.instead)}; for details run: qcore skus show {sku.id}",
        )


def load_skus(plugins: Iterable[EntryPoint] | None = None) -> Skus:
    """Read the records of installed plugins, without importing a plugin.

    Args:
        plugins: entry points to read instead of the installed ones.
    """

    def read_file(file: Path, origin: str) -> list[Sku]:
        return [replace(sku, origin=origin) for sku in read_skus(file)]

    entries, broken, claimed_twice = load(KIND, read_file, plugins=plugins)
    return Skus(entries=entries, broken=broken, claimed_twice=claimed_twice)


def refuse_hosted(model: str | Path) -> None:
    """Refuse a model that is served by API only, unless a local path of that name exists.

    Raises:
        InputError: ``QC-SKU-005``.
    """
    if not Path(model).expanduser().exists():
        load_skus().refuse_hosted(str(model))
