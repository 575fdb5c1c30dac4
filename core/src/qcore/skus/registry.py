"""The SKU records that are installed, and which of them a name or a model means.

Plugins bring records through the entry-point group ``qcore.skus`` (name -> package, files
``<package>/skus/*.yaml``), found without importing the plugin. Discovery never raises: a
broken file is listed with its reason. Use never degrades: asking for a record of a broken
file, or for a name that two plugins claim, is an error.

A model that is served by API only has a record too, so that a verb that needs weights can say
so instead of looking for it on the hub. What a record is stands in `qcore.skus.records`.

Codes: ``QC-SKU-001`` no record of that name, ``-002`` a record of a broken file, ``-003`` a
name that two plugins claim, ``-005`` a model without weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from ..errors import InputError, PluginError, QcoreError, UsageError, nearest
from ..io.plugin_data import plugin_files
from .file import read_skus
from .records import Sku

GROUP = "qcore.skus"
_ID_LINE = re.compile(r"^ *- id: *[\"']?([^\s\"']+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenSkus:
    """A file (or a whole plugin) whose records cannot be used.

    Attributes:
        origin: entry point that brought it.
        file: the file; ``None`` where none was found.
        reason: one line.
        names: ids that it would have brought, in lower case, as far as they could be read.
    """

    origin: str
    file: Path | None
    reason: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Skus:
    """All records that are installed.

    Attributes:
        skus: the usable ones, by origin, in the order of their file.
        broken: files that could not be used.
        claimed_twice: names that two plugins bring, in lower case, with both origins; the
            records are nobody's.
    """

    skus: tuple[Sku, ...]
    broken: tuple[BrokenSkus, ...] = ()
    claimed_twice: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Sku]:
        return iter(self.skus)

    def get(self, name: str) -> Sku:
        """The record of this name, in any case, with or without the organisation.

        Raises:
            UsageError: ``QC-SKU-001``, with the nearest name.
            PluginError: ``QC-SKU-002`` the name is in a broken file, ``QC-SKU-003`` two
                plugins claim it.
        """
        wanted = name.lower()
        if wanted in self.claimed_twice:
            raise PluginError(
                "QC-SKU-003",
                f"the record of {name} is brought by two plugins",
                found=" and ".join(self.claimed_twice[wanted]),
                fix="uninstall one of them",
            )
        found = self.find(name)
        if found is not None:
            return found
        for bad in self.broken:
            if wanted in bad.names:
                raise PluginError(
                    "QC-SKU-002",
                    f"the record of {name} from {bad.origin} cannot be used: {bad.reason}",
                    fix=f"update or uninstall {bad.origin}",
                )
        raise self._unknown(name)

    def find(self, name: str) -> Sku | None:
        """The record of this name, or ``None``."""
        wanted = name.lower()
        return next((sku for sku in self.skus if wanted in sku.names()), None)

    def _unknown(self, name: str) -> UsageError:
        wanted = name.lower()
        spelt = {known: sku.id for sku in self.skus for known in sku.names()}
        near = nearest(wanted, spelt)
        fix = f"did you mean {spelt[near]}?" if near else "qcore skus list shows them"
        unread = ", ".join(sorted({bad.origin for bad in self.broken}))
        what = "has no record" + (f" (those of {unread} could not be read)" if unread else "")
        return UsageError("QC-SKU-001", what, field="ID", found=name, fix=fix)

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
    found = entry_points(group=GROUP) if plugins is None else plugins
    skus: list[Sku] = []
    broken: list[BrokenSkus] = []
    for point in sorted(found, key=lambda p: (p.name, p.value)):
        files, reason = plugin_files(point, "skus")
        if reason:
            broken.append(BrokenSkus(origin=point.name, file=None, reason=reason))
        for file in files:
            try:
                skus += [replace(sku, origin=point.name) for sku in read_skus(file)]
            except QcoreError as error:
                bad = BrokenSkus(
                    origin=point.name, file=file, reason=error.message, names=_names_in(file)
                )
                broken.append(bad)
    usable, claimed_twice = _unique(skus)
    return Skus(skus=tuple(usable), broken=tuple(broken), claimed_twice=claimed_twice)


def refuse_hosted(model: str | Path) -> None:
    """Refuse a model that is served by API only; a folder of that name is what it is.

    Raises:
        InputError: ``QC-SKU-005``.
    """
    if not Path(model).expanduser().exists():
        load_skus().refuse_hosted(str(model))


def _unique(skus: list[Sku]) -> tuple[list[Sku], dict[str, tuple[str, str]]]:
    """Between two plugins nobody can say which record is meant, so it is nobody's."""
    owners: dict[str, list[str]] = {}
    for sku in skus:
        for name in sku.names():
            owners.setdefault(name, []).append(sku.origin)
    twice = {name: (two[0], two[1]) for name, two in owners.items() if len(two) > 1}
    return [sku for sku in skus if not sku.names() & twice.keys()], twice


def _names_in(file: Path) -> tuple[str, ...]:
    """Ids in a file that breaks the contract, looked for in its text: it may be no YAML."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    names = [name.lower() for name in _ID_LINE.findall(text)]
    return tuple(dict.fromkeys(n for name in names for n in (name, name.rpartition("/")[2])))
