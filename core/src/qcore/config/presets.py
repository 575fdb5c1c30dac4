"""Presets: named settings, kept as data files with a contract.

This file decides what a preset file is: YAML with ``schema_version: 1``,
``default_base_models`` (the model that stands for a generation, by generation; ``{}`` where
the file names none) and ``presets``, each with ``id``, ``aliases``, ``description``,
``settings`` and, where it is made for one model, ``model``. Core's file names sizes and
schedules and no model; plugins bring theirs through the entry-point group ``qcore.presets``
(name -> package, files ``<package>/presets/*.yaml``), found without importing the plugin.

Discovery never raises: a broken file is listed with its reason. Use never degrades: asking
for a preset of a broken file, or for a name that two plugins claim, is an error. It leaves
what a setting may be to `qcore.config.settings`.

Codes: ``QC-PRESET-001`` unknown preset, ``-002`` preset of a broken file, ``-003`` name
claimed twice, ``-004`` file that breaks the contract (a reason, raised on use), ``-005`` two
default bases of one generation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from ..errors import PluginError, QcoreError, UsageError, nearest
from ..io.plugin_data import plugin_files, yaml_files
from .convert import settings_of
from .settings import Settings
from .spec import Value
from .yaml import Items, Node, Scalar, Table, read

GROUP = "qcore.presets"
SCHEMA_VERSION = 1
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
            base of its file where that has one for one generation; ``None`` where there is none.
        origin: ``core``, or the entry point that brought it.
        file: where it stands.
    """

    id: str
    aliases: tuple[str, ...]
    description: str
    settings: Mapping[str, Value]
    base_model: str | None
    origin: str
    file: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class DefaultBase:
    """The model that stands for a generation where none was named.

    Attributes:
        generation: as detection names it.
        model: hub id.
        origin: entry point that brought it.
    """

    generation: str
    model: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenPresets:
    """A file (or a whole plugin) whose presets cannot be used.

    Attributes:
        origin: ``core``, or the entry point that brought it.
        file: the file; ``None`` where none was found.
        reason: one line.
        names: ids and aliases that it would have brought, as far as they could be read.
    """

    origin: str
    file: Path | None
    reason: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Presets:
    """All presets that are installed.

    Attributes:
        presets: the usable ones, core's first, then by origin.
        broken: files that could not be used.
        claimed_twice: names that two plugins bring, with both origins; neither is usable
            under that name.
        bases: default bases by generation, as files give them.
    """

    presets: tuple[Preset, ...]
    broken: tuple[BrokenPresets, ...] = ()
    claimed_twice: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    bases: tuple[DefaultBase, ...] = ()

    def __iter__(self) -> Iterator[Preset]:
        return iter(self.presets)

    def get(self, name: str) -> Preset:
        """The preset of this id or alias.

        Raises:
            UsageError: ``QC-PRESET-001``, with the nearest name.
            PluginError: ``QC-PRESET-002`` the name is in a broken file, ``QC-PRESET-003`` two
                plugins claim it.
        """
        if name in self.claimed_twice:
            raise PluginError(
                "QC-PRESET-003",
                f"preset {name} is brought by two plugins",
                found=" and ".join(self.claimed_twice[name]),
                fix="uninstall one of them",
            )
        known: dict[str, Preset] = {}
        for preset in self.presets:
            known |= dict.fromkeys((preset.id, *preset.aliases), preset)
        if name in known:
            return known[name]
        for bad in self.broken:
            if name in bad.names:
                raise PluginError(
                    "QC-PRESET-002",
                    f"preset {name} of {bad.origin} cannot be used: {bad.reason}",
                    fix=f"update or uninstall {bad.origin}",
                )
        raise self._unknown(name, known)

    def default_base_models(self) -> dict[str, str]:
        """Hub id by generation, where the installed files agree on one."""
        named: dict[str, set[str]] = {}
        for base in self.bases:
            named.setdefault(base.generation, set()).add(base.model)
        return {generation: min(ids) for generation, ids in named.items() if len(ids) == 1}

    def default_base_model(self, generation: str) -> str | None:
        """Hub id of the model that stands for a generation; ``None`` where none is named.

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

    def _unknown(self, name: str, known: Iterable[str]) -> UsageError:
        near = nearest(name.lower(), known)
        fix = f"did you mean {near}?" if near else "qcore presets list shows them"
        unread = ", ".join(bad.origin for bad in self.broken)
        what = "is no preset" + (f" (those of {unread} could not be read)" if unread else "")
        return UsageError("QC-PRESET-001", what, field="--preset", found=name, fix=fix)


def load_presets(plugins: Iterable[EntryPoint] | None = None) -> Presets:
    """Read core's presets and those of installed plugins; imports no plugin.

    Args:
        plugins: entry points to read in place of the installed ones.
    """
    found = entry_points(group=GROUP) if plugins is None else plugins
    sources: list[tuple[str, list[Path]]] = [("core", yaml_files(Path(__file__).parent))]
    broken: list[BrokenPresets] = []
    for point in sorted(found, key=lambda p: (p.name, p.value)):
        files, reason = plugin_files(point, "presets")
        sources.append((point.name, files))
        if reason:
            broken.append(BrokenPresets(origin=point.name, file=None, reason=reason))
    presets: list[Preset] = []
    bases: list[DefaultBase] = []
    for origin, files in sources:
        for file in files:
            try:
                defaults, found_here = _read(file, origin)
                bases += defaults
                presets += found_here
            except QcoreError as error:
                names = _names_in(file)
                bad = BrokenPresets(origin=origin, file=file, reason=error.message, names=names)
                broken.append(bad)
    usable, claimed_twice, clashes = _unique(presets)
    return Presets(
        presets=tuple(usable),
        broken=(*broken, *clashes),
        claimed_twice=claimed_twice,
        bases=tuple(bases),
    )


def _unique(
    presets: list[Preset],
) -> tuple[list[Preset], dict[str, tuple[str, str]], list[BrokenPresets]]:
    """Settle names that are claimed twice.

    Core's name stays core's: a plugin cannot take it away, and the plugin's preset is broken.
    Between two plugins nobody can say which is meant, so the name is nobody's. Within one
    origin the first keeps it.
    """
    owner: dict[str, Preset] = {}
    usable: list[Preset] = []
    claimed_twice: dict[str, tuple[str, str]] = {}
    clashes: list[BrokenPresets] = []
    for preset in presets:
        names = (preset.id, *preset.aliases)
        taken = [name for name in names if name in owner]
        if not taken:
            usable.append(preset)
            owner |= dict.fromkeys(names, preset)
            continue
        others = {owner[name].origin for name in taken}
        reason = f"{', '.join(taken)} is already a preset of {' and '.join(sorted(others))}"
        free = tuple(name for name in names if name not in owner)
        clashes.append(
            BrokenPresets(origin=preset.origin, file=preset.file, reason=reason, names=free)
        )
        for name in taken:
            if owner[name].origin not in ("core", preset.origin):
                claimed_twice[name] = (owner[name].origin, preset.origin)
    return usable, claimed_twice, clashes


def _names_in(file: Path) -> tuple[str, ...]:
    """Ids and aliases of a file that breaks the contract, as far as it can be read."""
    try:
        root = read(file)
    except UsageError:
        return ()
    listed = root.entries.get("presets") if isinstance(root, Table) else None
    names: list[str] = []
    for entry in listed.items if isinstance(listed, Items) else ():
        if isinstance(entry, Table):
            aliases = entry.entries.get("aliases")
            nodes = (
                entry.entries.get("id"),
                *(aliases.items if isinstance(aliases, Items) else ()),
            )
            names += [node.text for node in nodes if isinstance(node, Scalar)]
    return tuple(names)


def _read(file: Path, origin: str) -> tuple[list[DefaultBase], list[Preset]]:
    """Default bases and presets of one file.

    Raises:
        UsageError: the first breach of the contract.
    """
    root = read(file)
    entries = _keys(root, _FILE_KEYS, file, "the file")
    version = _text(entries["schema_version"], file, "schema_version")
    if version != str(SCHEMA_VERSION):
        raise _breach(file, "schema_version", version, str(SCHEMA_VERSION))
    bases = _bases(entries["default_base_models"], origin, file)
    default = bases[0].model if len(bases) == 1 else None
    listed = entries["presets"]
    if not isinstance(listed, Items):
        raise _breach(file, "presets", "something else", "a list")
    presets = [_preset(node, default, origin, file) for node in listed.items]
    names = [name for preset in presets for name in (preset.id, *preset.aliases)]
    for name in names:
        if names.count(name) > 1:
            raise _breach(file, name, "two presets of that name", "one")
    return bases, presets


def _bases(node: Node, origin: str, file: Path) -> list[DefaultBase]:
    if not isinstance(node, Table):
        raise _breach(file, "default_base_models", "something else", "a mapping by generation")
    return [
        DefaultBase(
            generation=generation,
            model=_text(model, file, f"default_base_models.{generation}"),
            origin=origin,
        )
        for generation, model in node.entries.items()
    ]


def _preset(node: Node, default: str | None, origin: str, file: Path) -> Preset:
    named = node.entries.get("id") if isinstance(node, Table) else None
    where = named.text if isinstance(named, Scalar) else f"the preset at line {node.line}"
    entries = _keys(node, _PRESET_KEYS, file, where, optional=("aliases", "model"))
    ident = _text(entries["id"], file, where)
    aliases = entries.get("aliases", Items(items=(), line=node.line))
    if not isinstance(aliases, Items):
        raise _breach(file, f"{where}.aliases", "something else", "a list")
    words = tuple(_text(item, file, f"{where}.aliases") for item in aliases.items)
    for name in (ident, *words):
        if not _ID.fullmatch(name):
            raise _breach(file, where, name, "lower-case letters and digits joined by . or -")
    own = _model(entries["model"], file, f"{where}.model") if "model" in entries else None
    source = f"{file}: {where}"
    settings = settings_of(entries["settings"], source)
    Settings.from_dict(settings, source=source)  # alone they must make a run too
    return Preset(
        id=ident,
        aliases=words,
        description=_text(entries["description"], file, f"{where}.description"),
        settings=settings,
        base_model=own or default,
        origin=origin,
        file=file,
    )


def _keys(
    node: Node | None, keys: tuple[str, ...], file: Path, where: str, optional: tuple[str, ...] = ()
) -> dict[str, Node]:
    """The entries of a mapping that has these keys and no other."""
    if not isinstance(node, Table):
        raise _breach(file, where, "something else", f"a mapping of {', '.join(keys)}")
    for key in node.entries:
        if key not in keys:
            raise _breach(file, where, f"the key {key}", ", ".join(keys))
    for key in keys:
        if key not in node.entries and key not in optional:
            raise _breach(file, where, f"no {key}", ", ".join(keys))
    return node.entries


def _text(node: Node, file: Path, where: str) -> str:
    if not isinstance(node, Scalar) or not node.text.strip():
        raise _breach(file, where, "no text", "text")
    return " ".join(node.text.split())


def _model(node: Node, file: Path, where: str) -> str | None:
    if isinstance(node, Scalar) and not node.quoted and node.text in ("", "null", "~"):
        return None
    return _text(node, file, where)


def _breach(file: Path, where: str, found: str, expected: str) -> UsageError:
    return UsageError(
        "QC-PRESET-004",
        "breaks the preset contract",
        file=file,
        field=where,
        found=found,
        expected=expected,
    )
