"""Reads all of qcore's entry-point groups from package metadata: disabled, duplicate, incompatible.

This file decides every status of an entry point that is known without an import (disabled,
incompatible, duplicate, broken), with the same rules for every group. It never raises for the
content of an environment: unreadable metadata becomes a status with a reason. The caller decides
what to do with an entry point (a plugin's module, a package with data files, a command).

The version gate imports packaging, which is too slow for ``qcore --help``; a caller that only lists
names switches it off.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import Failure, UsageError, contained, nearest

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

PLUGINS: Final = "qcore.plugins"
INDEX: Final = "qcore.model_types"
COMMANDS: Final = "qcore.commands"
PRESETS: Final = "qcore.presets"
SKUS: Final = "qcore.skus"
KINDS: Final = "qcore.media_kinds"
DATA_FORMATS: Final = "qcore.data_formats"
#: group -> what the name and the value of an entry point stand for, as ``name -> value``.
GROUPS: Final[Mapping[str, str]] = {
    PLUGINS: "plugin -> module with its hooks",
    INDEX: "model_type -> module of a plugin",
    COMMANDS: "command -> click command",
    PRESETS: "plugin -> package with presets/*.yaml",
    SKUS: "plugin -> package with skus/*.yaml",
    KINDS: "type of a content part -> module",
    DATA_FORMATS: "format of rows -> module",
    "qcore.export_targets": "target -> module",
    "qcore.trackers": "tracker -> module",
    "qcore.providers": "provider -> module",
}
#: Groups whose names must be unique; of two entry points with one name, neither is used.
_UNIQUE: Final = frozenset(GROUPS) - {PLUGINS, INDEX, PRESETS, SKUS, KINDS}

FRAMEWORK: Final = "qcore-framework"
DISABLE: Final = "QCORE_DISABLE_PLUGINS"


class Status(str, Enum):
    """Status of a plugin or another entry point. Only hooks of `LOADED` plugins are called."""

    AVAILABLE = "available"  #: installed and compatible; not imported yet
    LOADED = "loaded"  #: imported, and its hooks are valid
    DISABLED = "disabled"  #: named in QCORE_DISABLE_PLUGINS
    INCOMPATIBLE = "incompatible"  #: requires another version of qcore-framework
    DUPLICATE = "duplicate"  #: another plugin has the same name or module; neither is used
    BROKEN = "broken"  #: reading its metadata, importing it or describing it raises
    INVALID = "invalid"  #: it violates the contract of hooks, records or index


class Identity(NamedTuple):
    """The distribution of an entry point: its name, version and requirements."""

    distribution: str = "(unnamed)"
    version: str = "(no version)"
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry point of one of `GROUPS`.

    Attributes:
        group: name of the group.
        name: name of the entry point.
        value: the module, package or attribute that it refers to.
        identity: its distribution.
        point: the entry point; ``None`` if the metadata could not be read.
        status: `AVAILABLE`, or why it is not used.
        reason: an explanation of the status in one line; ``None`` without one.
    """

    group: str
    name: str
    value: str
    identity: Identity
    point: EntryPoint | None = None
    status: Status = Status.AVAILABLE
    reason: str | None = None


def entries(
    group: str, points: Iterable[EntryPoint] | None = None, *, gated: bool = True
) -> list[Entry]:
    """Return the entry points of one group, sorted by name, each with its status.

    Args:
        group: one of `GROUPS`, except `PLUGINS` and `INDEX`, which `qcore.plugins.discovery`
            checks together.
        points: entry points to use instead of the environment's.
        gated: compare each requirement on the framework with the running version.
    """
    if points is None:
        points, _ = read_points((group, PLUGINS) if disabled_names() else (group,))
    points = list(points)
    identities = Identities()
    plugins: dict[Identity, set[str]] = {}
    for point in points:
        if point.group == PLUGINS:
            plugins.setdefault(identities[point], set()).add(normal(point.name))
    own = [point for point in points if point.group == group]
    judged = [_judged(point, identities[point], plugins, gated) for point in own]
    judged.sort(key=lambda entry: (entry.name, entry.identity.distribution, entry.value))
    return _without_duplicates(judged) if group in _UNIQUE else judged


def usable(
    group: str, points: Iterable[EntryPoint] | None = None, *, gated: bool = True
) -> list[Entry]:
    """Return the available entry points of one group; see `entries`."""
    judged = entries(group, points, gated=gated)
    return [entry for entry in judged if entry.status is Status.AVAILABLE]


def _judged(
    point: EntryPoint, identity: Identity, plugins: Mapping[Identity, set[str]], gated: bool
) -> Entry:
    status, reason = Status.AVAILABLE, None
    own = {normal(point.name), normal(identity.distribution), *plugins.get(identity, ())}
    if own & disabled_names():
        status, reason = Status.DISABLED, f"named in {DISABLE}"
    elif gated:
        status, reason = gate(identity)
    return Entry(
        group=point.group, name=point.name, value=point.value.strip(), identity=identity,
        point=point, status=status, reason=reason,
    )  # fmt: skip


def _without_duplicates(judged: list[Entry]) -> list[Entry]:
    from dataclasses import replace

    result = []
    for entry in judged:
        twins = [
            f"{twin.identity.distribution} {twin.identity.version}"
            for twin in judged
            if twin is not entry and twin.name == entry.name and twin.status is Status.AVAILABLE
        ]
        if twins and entry.status is Status.AVAILABLE:
            reason = f"name '{entry.name}' is also that of {', '.join(sorted(twins))}"
            entry = replace(entry, status=Status.DUPLICATE, reason=reason)
        result.append(entry)
    return result


def read_points(groups: Iterable[str]) -> tuple[list[EntryPoint], list[Entry]]:
    """Return the environment's entry points, and entries for unreadable distributions."""
    from importlib import metadata

    groups = tuple(groups)
    every = contained(metadata.entry_points)
    if not isinstance(every, Failure):
        return [point for group in groups for point in every.select(group=group)], []
    # One unreadable distribution fails the whole call: read each alone, to name the one at fault.
    points: list[EntryPoint] = []
    unreadable: list[Entry] = []
    seen: set[str] = set()
    for dist in metadata.distributions():
        identity = identity_of(dist)
        if (name := normal(identity.distribution)) in seen:
            continue
        seen.add(name)
        own = contained(partial(_entry_points, dist))
        if not isinstance(own, Failure):
            points += [point for point in own if point.group in groups]
            continue
        text = contained(partial(dist.read_text, "entry_points.txt"))
        if isinstance(text, Failure) or "qcore." in (text or ""):
            reason = f"entry_points.txt cannot be read: {own}"
            broken = Entry(
                group=PLUGINS, name=identity.distribution, value="", identity=identity,
                status=Status.BROKEN, reason=reason,
            )  # fmt: skip
            unreadable.append(broken)
    return points, unreadable


def _entry_points(dist: Distribution) -> list[EntryPoint]:
    return list(dist.entry_points)


class Identities:
    """Identities by entry point; the metadata of each distribution are parsed once."""

    def __init__(self) -> None:
        self._known: dict[int, Identity] = {}

    def __getitem__(self, point: EntryPoint) -> Identity:
        dist = point.dist
        if id(dist) not in self._known:
            self._known[id(dist)] = identity_of(dist)
        return self._known[id(dist)]


def identity_of(dist: Distribution | None) -> Identity:
    """Return the identity of a distribution; unreadable metadata give the default identity."""
    if dist is None:
        return Identity()

    def read() -> Identity:
        fields = dist.metadata  # parsed again at every access
        return Identity(
            str(fields["Name"] or Identity().distribution),
            str(fields["Version"] or Identity().version),
            tuple(fields.get_all("Requires-Dist") or ()),
        )

    identity = contained(read)
    return Identity() if isinstance(identity, Failure) else identity


def normal(name: str) -> str:
    """Return a distribution's name in normalized form, as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def disabled_names() -> set[str]:
    """Return the normalized names of plugins or distributions in `DISABLE`."""
    return {normal(name) for name in os.environ.get(DISABLE, "").split(",") if name.strip()}


def unknown_disabled() -> list[tuple[str, str | None]]:
    """Return the names in `DISABLE` that no installed plugin has, each with the nearest name."""
    if not disabled_names():
        return []
    points, unreadable = read_points(group for group in GROUPS if group != INDEX)
    identities = Identities()
    known = {normal(entry.identity.distribution) for entry in unreadable}
    for point in points:
        known |= {normal(point.name), normal(identities[point].distribution)}
    return [(name, nearest(name, sorted(known))) for name in sorted(disabled_names() - known)]


def check_disabled() -> None:
    """Refuse a name in `DISABLE` that is misspelled, so that its plugin would stay in use.

    Raises:
        UsageError: ``QC-PLUGIN-005``.
    """
    for name, near in unknown_disabled():
        raise UsageError(
            "QC-PLUGIN-005",
            "names no installed plugin",
            field=DISABLE,
            found=name,
            expected="names of plugins or distributions with commas, as qcore plugins list shows",
            fix=f"write {near} if you mean it, or take {name} out" if near else f"take {name} out",
        )


def gate(identity: Identity) -> tuple[Status, str | None]:
    """Compare a distribution's requirement on the framework with the running version.

    Returns:
        `AVAILABLE`, possibly with a remark; or `INVALID` or `INCOMPATIBLE` with the reason.
    """
    ours = [
        line
        for line in identity.requires
        if normal(re.split(r"[^A-Za-z0-9._-]", line.strip(), maxsplit=1)[0]) == FRAMEWORK
    ]
    if not ours:
        return Status.AVAILABLE, f"does not say which {FRAMEWORK} it needs"
    unmet = contained(partial(_unmet, ours))
    if isinstance(unmet, Failure):
        return Status.INVALID, f"its requirement on {FRAMEWORK} does not parse: {unmet}"
    return (Status.AVAILABLE, None) if unmet is None else (Status.INCOMPATIBLE, unmet)


def _unmet(requirements: list[str]) -> str | None:
    from packaging.requirements import Requirement

    from .version import __version__

    for line in requirements:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        if not need.specifier.contains(__version__, prereleases=True):
            return f"requires {FRAMEWORK}{need.specifier}, installed is {__version__}"
    return None
