"""Preset files (``presets/*.yaml`` of core and plugins): their format, aliases, default models.

This file decides the format of a preset file: ``schema_version: 1``, ``default_base_models``
(default model by generation; ``{}`` for none) and ``presets``, each with ``id``, ``aliases``,
``description``, ``settings`` and, if it is made for one model, ``model``. The file of core has
schedules and no models. Plugins add files through the entry-point group ``qcore.presets`` (name ->
package, files ``<package>/presets/*.yaml``), which are found without importing the plugin.
`qcore.config.registry` decides which preset a name means.

Codes: ``QC-PRESET-001`` unknown preset, ``-002`` preset of a broken file, ``-003`` name
claimed twice, ``-004`` file that breaks the contract (a reason, raised on use), ``-005`` two
default bases of one generation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

from ..errors import PluginError
from ..io.entry_points import PRESETS
from ..io.plugin_data import yaml_files
from .convert import settings_of
from .expect import Contract, Expect
from .registry import Kind, Registry, load
from .settings import Settings
from .spec import Value
from .yaml import MappingNode, ScalarNode

SCHEMA_VERSION = 1
KIND = Kind(
    noun="preset",
    group=PRESETS,
    folder="presets",
    field="--preset",
    listing="qcore presets list",
    unknown="QC-PRESET-001",
    broken="QC-PRESET-002",
    contested="QC-PRESET-003",
)
_CONTRACT = Contract("QC-PRESET-004", "breaks the preset contract")
_ID = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
_FILE_KEYS = ("schema_version", "default_base_models", "presets")
_PRESET_KEYS = ("id", "aliases", "description", "model", "settings")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Named settings.

    Attributes:
        id: its name.
        aliases: other names for it.
        description: one line.
        settings: values by setting, checked.
        base_model: hub id of the model it is made for: its own ``model``, else the default
            base of its file if the file has exactly one; else ``None``.
        origin: ``core``, or the entry point that brought it.
        file: the file that contains it.
    """

    id: str
    aliases: tuple[str, ...]
    description: str
    settings: Mapping[str, Value]
    base_model: str | None
    origin: str
    file: Path

    def names(self) -> tuple[str, ...]:
        """Id and aliases."""
        return (self.id, *self.aliases)


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultBase:
    """The default model of a generation.

    Attributes:
        generation: as detection names it.
        model: hub id.
        origin: entry point that brought it.
    """

    generation: str
    model: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Presets(Registry[Preset]):
    """All presets that are installed.

    Attributes:
        bases: default bases of all files.
    """

    kind: ClassVar[Kind] = KIND

    bases: tuple[DefaultBase, ...] = ()

    def default_base_models(self) -> dict[str, str]:
        """Hub id by generation; without generations on which files disagree."""
        named: dict[str, set[str]] = {}
        for base in self.bases:
            named.setdefault(base.generation, set()).add(base.model)
        return {generation: min(ids) for generation, ids in named.items() if len(ids) == 1}

    def default_base_model(self, generation: str) -> str | None:
        """Hub id of the default model of a generation, or ``None``.

        Raises:
            PluginError: ``QC-PRESET-005`` two plugins name different ones.
        """
        named = {base.model: base.origin for base in self.bases if base.generation == generation}
        if len(named) > 1:
            raise PluginError(
                "QC-PRESET-005",
                f"two plugins name a default base of generation {generation}",
                found=" and ".join(f"{model} ({origin})" for model, origin in named.items()),
                fix="pass --model, or uninstall one of them",
            )
        return next(iter(named), None)


def load_presets(plugins: Iterable[EntryPoint] | None = None) -> Presets:
    """Read core's presets and those of installed plugins; imports no plugin.

    Args:
        plugins: entry points to read in place of the installed ones.
    """
    bases: list[DefaultBase] = []

    def read_file(file: Path, origin: str) -> list[Preset]:
        defaults, presets = _read(file, origin)
        bases.extend(defaults)
        return presets

    own = yaml_files(Path(__file__).parent)
    entries, broken, claimed_twice = load(KIND, read_file, own=own, plugins=plugins)
    return Presets(entries=entries, broken=broken, claimed_twice=claimed_twice, bases=tuple(bases))


def _read(file: Path, origin: str) -> tuple[list[DefaultBase], list[Preset]]:
    """Read the default bases and presets of one file.

    Raises:
        UsageError: the first breach of the contract.
    """
    entries = Expect.of_file(file, _CONTRACT).keys(_FILE_KEYS)
    entries["schema_version"].choice((str(SCHEMA_VERSION),))
    bases = [
        DefaultBase(generation=generation, model=model.text(), origin=origin)
        for generation, model in entries["default_base_models"]
        .mapping("a mapping by generation")
        .items()
    ]
    default = bases[0].model if len(bases) == 1 else None
    presets = [_preset(entry, default, origin) for entry in entries["presets"].items()]
    names = [name for preset in presets for name in preset.names()]
    for name in names:
        if names.count(name) > 1:
            raise entries["presets"].renamed(name).breach("two presets of that name", "one")
    return bases, presets


def _preset(entry: Expect, default: str | None, origin: str) -> Preset:
    node = entry.node
    named = node.entries.get("id") if isinstance(node, MappingNode) else None
    line = 1 if node is None else node.line
    entry = entry.renamed(
        named.text if isinstance(named, ScalarNode) else f"the preset at line {line}"
    )
    entries = entry.keys(_PRESET_KEYS, optional=("aliases", "model"))
    ident = entries["id"].text()
    aliases = entries["aliases"].items() if "aliases" in entries else ()
    words = tuple(alias.text() for alias in aliases)
    for name in (ident, *words):
        if not _ID.fullmatch(name):
            raise entry.breach(name, "lower-case letters and digits joined by . or -")
    own = _model(entries["model"]) if "model" in entries else None
    source = f"{entry.file}: {entry.place}"
    settings = settings_of(entries["settings"].node, source)
    Settings.from_dict(settings, source=source)  # the preset alone must be valid too
    return Preset(
        id=ident,
        aliases=words,
        description=entries["description"].text(),
        settings=settings,
        base_model=own or default,
        origin=origin,
        file=entry.file,
    )


def _model(entry: Expect) -> str | None:
    node = entry.node
    if isinstance(node, ScalarNode) and not node.quoted and node.text in ("", "null", "~"):
        return None
    return entry.text()
