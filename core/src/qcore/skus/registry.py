"""The SKU records that are installed, and which of them a name or a model means.

Plugins bring records through the entry-point group ``qcore.skus`` (name -> package, files
``<package>/skus/*.yaml``), found without importing the plugin. Names are taken in any case, with
or without the organisation; which record a name means where two plugins bring it is
`qcore.config.registry`'s business.

A model that is served by API only has a record too, so that a verb that needs weights can say
so instead of looking for it on the hub. What a record is stands in `qcore.skus.records`.

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
    """All records that are installed."""

    kind: ClassVar[Kind] = KIND

    def refuse_hosted(self, model: str) -> None:
        """Refuse a model that is served by API only.

        Args:
            model: what the user named; ``@REVISION`` and a provider's ``:VARIANT`` are left out.

        Raises:
            InputError: ``QC-SKU-005``.
        """
        sku = self.find(re.split("[@:]", model)[0])
        if sku is None or not sku.hosted:
            return
        providers = ", ".join(dict.fromkeys(one.provider for one in sku.served))
        raise InputError(
            "QC-SKU-005",
            f"is served by API only ({providers}): there are no weights to inspect, train, merge "
            "or generate with",
            file=model,
            expected=f"an open model of generation {sku.generation}",
            fix=f"name {' or '.join(sku.instead)}; qcore skus show {sku.id} tells what is known",
        )


def load_skus(plugins: Iterable[EntryPoint] | None = None) -> Skus:
    """Read the records of installed plugins; imports no plugin.

    Args:
        plugins: entry points to read in place of the installed ones.
    """

    def read_file(file: Path, origin: str) -> list[Sku]:
        return [replace(sku, origin=origin) for sku in read_skus(file)]

    entries, broken, claimed_twice = load(KIND, read_file, plugins=plugins)
    return Skus(entries=entries, broken=broken, claimed_twice=claimed_twice)


def refuse_hosted(model: str | Path) -> None:
    """Refuse a model that is served by API only; a folder of that name is what it is.

    Raises:
        InputError: ``QC-SKU-005``.
    """
    if not Path(model).expanduser().exists():
        load_skus().refuse_hosted(str(model))
