"""Name lookup in presets and SKU records: aliases, names that two plugins claim, broken files.

A SKU record holds facts about one published model (`qcore.skus`). This file decides which entry a
name means where several files bring it, and what using a name of a broken file is. Discovery never
raises: a broken file is listed with its reason. Use never degrades: a name of a broken file, or one
that two plugins claim, is an error.

Names are settled so: a name of core stays core's; within one plugin the first entry keeps its
names; if two plugins claim a name, it means neither entry, and an entry that loses its id this
way is not listed at all. What a file must hold is its reader's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

from ..errors import PluginError, QcoreError, UsageError, nearest
from ..io.entry_points import Status
from ..io.entry_points import entries as installed
from ..io.plugin_data import plugin_files
from .yaml import MappingNode, ScalarNode, SequenceNode, read

CORE = "core"  #: origin of entries that no plugin brought
_ID_LINE = re.compile(r"^ *- id: *[\"']?([^\s\"']+)", re.MULTILINE)


class Named(Protocol):
    """What a registry needs to know of an entry."""

    @property
    def id(self) -> str:
        """Its main name."""

    @property
    def origin(self) -> str:
        """``core``, or the entry point that brought it."""

    @property
    def file(self) -> Path:
        """Where it is written."""

    def names(self) -> Collection[str]:
        """Every name it answers to, as `Kind.spellings` gives them."""


T = TypeVar("T", bound=Named)


def _as_written(name: str) -> tuple[str, ...]:
    return (name,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a registry holds, and the words and codes of its errors.

    Attributes:
        noun: ``preset``.
        group: entry-point group of plugins' files.
        folder: folder in a plugin's package that holds them.
        field: the flag or argument that names an entry.
        listing: the command that lists them.
        unknown: code for a name that nothing brings.
        broken: code for a name of a broken file.
        contested: code for a name that two plugins claim.
        spellings: the forms of a name under which an entry is looked up; the first one is that
            of the name itself.
    """

    noun: str
    group: str
    folder: str
    field: str
    listing: str
    unknown: str
    broken: str
    contested: str
    spellings: Callable[[str], Sequence[str]] = _as_written


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenFile:
    """A file (or a whole plugin, or one entry) that cannot be used.

    Attributes:
        origin: ``core``, or the entry point that brought it.
        file: the file; ``None`` where the plugin has none.
        reason: one line.
        names: names that it would have brought, as far as they could be read.
    """

    origin: str
    file: Path | None
    reason: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry(Generic[T]):
    """All entries of one kind that are installed. Subclasses set `kind`.

    Attributes:
        entries: the usable ones, core's first, then by origin.
        broken: files and entries that could not be used.
        claimed_twice: names that two plugins claim, with both origins.
    """

    kind: ClassVar[Kind]

    entries: tuple[T, ...] = ()
    broken: tuple[BrokenFile, ...] = ()
    claimed_twice: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[T]:
        return iter(self.entries)

    def find(self, name: str) -> T | None:
        """The entry of this name; ``None`` where no usable entry, or more than one, has it."""
        wanted = self.kind.spellings(name)[0]
        if wanted in self.claimed_twice:
            return None
        return next((entry for entry in self.entries if wanted in entry.names()), None)

    def get(self, name: str) -> T:
        """The entry of this name.

        Raises:
            UsageError: `Kind.unknown`, with the nearest name.
            PluginError: `Kind.broken` the name is in a broken file, `Kind.contested` two
                plugins claim it.
        """
        kind, wanted = self.kind, self.kind.spellings(name)[0]
        if wanted in self.claimed_twice:
            raise PluginError(
                kind.contested,
                f"two plugins bring {kind.noun} {name}",
                found=" and ".join(self.claimed_twice[wanted]),
                fix="uninstall one of them",
            )
        if (entry := self.find(name)) is not None:
            return entry
        for broken in self.broken:
            if wanted in broken.names:
                raise PluginError(
                    kind.broken,
                    f"{kind.noun} {name} of {broken.origin} cannot be used: {broken.reason}",
                    fix=f"update or uninstall {broken.origin}",
                )
        raise self._unknown(name)

    def _unknown(self, name: str) -> UsageError:
        known = {spelling: entry.id for entry in self.entries for spelling in entry.names()}
        near = nearest(name.lower(), known)
        unread = ", ".join(sorted({broken.origin for broken in self.broken}))
        return UsageError(
            self.kind.unknown,
            f"unknown {self.kind.noun}"
            + (f" (those of {unread} could not be read)" if unread else ""),
            field=self.kind.field,
            found=name,
            fix=f"did you mean {known[near]}?" if near else f"{self.kind.listing} shows them",
        )


class Loaded(NamedTuple, Generic[T]):
    """What `load` made of all files, in the fields of `Registry`."""

    entries: tuple[T, ...]
    broken: tuple[BrokenFile, ...]
    claimed_twice: Mapping[str, tuple[str, str]]


def load(
    kind: Kind,
    read_file: Callable[[Path, str], Iterable[T]],
    *,
    own: Sequence[Path] = (),
    plugins: Iterable[EntryPoint] | None = None,
) -> Loaded[T]:
    """Read core's files and those of installed plugins; imports no plugin.

    Args:
        kind: what is read.
        read_file: the entries of one file that an origin brought; a `QcoreError` makes the file
            a broken one.
        own: core's files.
        plugins: entry points to read in place of the installed ones.
    """
    sources: list[tuple[str, Sequence[Path]]] = [(CORE, own)]
    broken: list[BrokenFile] = []
    for brought in installed(kind.group, plugins):
        if brought.status is Status.DISABLED:
            continue
        files, reason = plugin_files(brought, kind.folder)
        sources.append((brought.name, files))
        if reason:
            broken.append(BrokenFile(origin=brought.name, file=None, reason=reason))
    entries: list[T] = []
    for origin, paths in sources:
        for file in paths:
            try:
                entries += read_file(file, origin)
            except QcoreError as error:
                names = tuple(
                    dict.fromkeys(form for name in _names_in(file) for form in kind.spellings(name))
                )
                broken.append(
                    BrokenFile(origin=origin, file=file, reason=error.message, names=names)
                )
    usable, clashes, claimed_twice = _settle(kind, entries)
    return Loaded(usable, (*broken, *clashes), claimed_twice)


def _settle(
    kind: Kind, entries: Sequence[T]
) -> tuple[tuple[T, ...], list[BrokenFile], dict[str, tuple[str, str]]]:
    """Usable entries, entries that lost to another, and names that two plugins claim."""
    owners: dict[str, list[T]] = {}
    accepted: list[T] = []
    clashes: list[BrokenFile] = []
    for entry in entries:
        taken = {
            name: owner.origin
            for name in sorted(entry.names())
            for owner in owners.get(name, ())
            if owner.origin in (CORE, entry.origin)
        }
        if taken:
            reason = f"{', '.join(taken)} is already a {kind.noun} of {min(taken.values())}"
            clashes.append(_clash(entry, reason, without=taken))
            continue
        accepted.append(entry)
        for name in entry.names():
            owners.setdefault(name, []).append(entry)
    claimed_twice = {
        name: (two[0].origin, two[1].origin) for name, two in owners.items() if len(two) > 1
    }
    usable: list[T] = []
    for entry in accepted:
        ident = kind.spellings(entry.id)[0]
        if ident not in claimed_twice:
            usable.append(entry)
        elif not claimed_twice.keys() >= set(entry.names()):
            reason = f"two plugins bring {kind.noun} {ident}"
            clashes.append(_clash(entry, reason, without=claimed_twice))
    return tuple(usable), clashes, claimed_twice


def _clash(entry: Named, reason: str, *, without: Collection[str]) -> BrokenFile:
    names = tuple(name for name in entry.names() if name not in without)
    return BrokenFile(origin=entry.origin, file=entry.file, reason=reason, names=names)


def _names_in(file: Path) -> list[str]:
    """Ids and aliases of a file that breaks its contract, as far as it can be read."""
    try:
        root = read(file)
    except UsageError:  # it may be no YAML
        return _ids_in_text(file)
    lists = root.entries.values() if isinstance(root, MappingNode) else ()
    names: list[str] = []
    for listed in lists:
        for entry in listed.items if isinstance(listed, SequenceNode) else ():
            if isinstance(entry, MappingNode):
                aliases = entry.entries.get("aliases")
                nodes = (
                    entry.entries.get("id"),
                    *(aliases.items if isinstance(aliases, SequenceNode) else ()),
                )
                names += [node.text for node in nodes if isinstance(node, ScalarNode)]
    return names


def _ids_in_text(file: Path) -> list[str]:
    try:
        return _ID_LINE.findall(file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []
