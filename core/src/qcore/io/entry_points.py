"""Entry points of qcore's groups: found by metadata, disabled, version-gated; nothing is imported.

This file decides every status of an entry point that can be known without an import, for every
group alike. It raises nothing for what an environment holds: what cannot be read becomes a status
with a reason. What an entry point stands for (a plugin's module, a package with data files, a
command) is the business of who asks for its group.

The version gate imports packaging, which ``qcore --help`` must not pay for: a caller that only
lists names leaves it out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from ..errors import Failure, contained

if TYPE_CHECKING:
    from importlib.metadata import Distribution, EntryPoint

PLUGINS: Final = "qcore.plugins"
INDEX: Final = "qcore.model_types"
COMMANDS: Final = "qcore.commands"
PRESETS: Final = "qcore.presets"
SKUS: Final = "qcore.skus"
KINDS: Final = "qcore.media_kinds"
#: group -> what the value of an entry point names; the name is what is in front.
GROUPS: Final[Mapping[str, str]] = {
    PLUGINS: "plugin -> module with its hooks",
    INDEX: "model_type -> module of a plugin",
    COMMANDS: "command -> click command",
    PRESETS: "plugin -> package with presets/*.yaml",
    SKUS: "plugin -> package with skus/*.yaml",
    KINDS: "type of a content part -> module",
    "qcore.data_formats": "format of rows -> module",
    "qcore.export_targets": "target -> module",
    "qcore.trackers": "tracker -> module",
    "qcore.providers": "provider -> module",
}
#: Groups whose names must be unique: which of two is meant would be a guess.
_UNIQUE: Final = frozenset(GROUPS) - {PLUGINS, INDEX, PRESETS, SKUS, KINDS}

FRAMEWORK: Final = "qcore-framework"
DISABLE: Final = "QCORE_DISABLE_PLUGINS"


class Status(str, Enum):
    """What became of a plugin or of another entry point. Only `LOADED` plugins are asked."""

    AVAILABLE = "available"  #: installed and compatible; not imported yet
    LOADED = "loaded"  #: imported, and its hooks are sound
    DISABLED = "disabled"  #: named in QCORE_DISABLE_PLUGINS
    INCOMPATIBLE = "incompatible"  #: requires another version of qcore-framework
    DUPLICATE = "duplicate"  #: its name or its module is claimed twice; none of them is used
    BROKEN = "broken"  #: its metadata, its import or its description raises
    INVALID = "invalid"  #: it breaks the contract of hooks, records or index


class Identity(NamedTuple):
    """Whose entry point it is, and what its distribution requires."""

    distribution: str = "(unnamed)"
    version: str = "(no version)"
    requires: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """An entry point of one of `GROUPS`.

    Attributes:
        group: its group.
        name: what it names.
        value: the module, package or attribute that it stands for.
        identity: its distribution.
        point: the entry point itself; ``None`` where the metadata could not be read.
        status: `AVAILABLE`, or why it is not used.
        reason: one line; ``None`` where there is nothing to say.
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
    """The entry points of one group in the order of their names, each with its status.

    Args:
        group: one of `GROUPS`, but not `PLUGINS` and not `INDEX`, which
            `qcore.plugins.discovery` judges together.
        points: used instead of the environment's.
        gated: compare each requirement on the framework with the version that runs.
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
    found = [_judged(point, identities[point], plugins, gated) for point in own]
    found.sort(key=lambda entry: (entry.name, entry.identity.distribution, entry.value))
    return _without_duplicates(found) if group in _UNIQUE else found


def usable(
    group: str, points: Iterable[EntryPoint] | None = None, *, gated: bool = True
) -> list[Entry]:
    """Those of `entries` that are available."""
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


def _without_duplicates(found: list[Entry]) -> list[Entry]:
    from dataclasses import replace

    result = []
    for entry in found:
        twins = [
            f"{twin.identity.distribution} {twin.identity.version}"
            for twin in found
            if twin is not entry and twin.name == entry.name and twin.status is Status.AVAILABLE
        ]
        if twins and entry.status is Status.AVAILABLE:
            reason = f"name '{entry.name}' is also that of {', '.join(sorted(twins))}"
            entry = replace(entry, status=Status.DUPLICATE, reason=reason)
        result.append(entry)
    return result


def read_points(groups: Iterable[str]) -> tuple[list[EntryPoint], list[Entry]]:
    """Entry points of the environment, and distributions whose entry points cannot be read."""
    from importlib import metadata

    groups = tuple(groups)
    every = contained(metadata.entry_points)
    if not isinstance(every, Failure):
        return [point for group in groups for point in every.select(group=group)], []
    # One unreadable distribution spoils the common call: read each alone, to name the culprit.
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
    """Identities by entry point, each distribution's metadata parsed once."""

    def __init__(self) -> None:
        self._known: dict[int, Identity] = {}

    def __getitem__(self, point: EntryPoint) -> Identity:
        dist = point.dist
        if id(dist) not in self._known:
            self._known[id(dist)] = identity_of(dist)
        return self._known[id(dist)]


def identity_of(dist: Distribution | None) -> Identity:
    """Identity of a distribution, whatever state its metadata is in."""
    if dist is None:
        return Identity()

    def read() -> Identity:
        fields = dist.metadata  # parsed anew at every access
        return Identity(
            str(fields["Name"] or Identity().distribution),
            str(fields["Version"] or Identity().version),
            tuple(fields.get_all("Requires-Dist") or ()),
        )

    found = contained(read)
    return Identity() if isinstance(found, Failure) else found


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def disabled_names() -> set[str]:
    """What `DISABLE` names: plugins or distributions, as `normal` spells them."""
    return {normal(name) for name in os.environ.get(DISABLE, "").split(",") if name.strip()}


def gate(identity: Identity) -> tuple[Status, str | None]:
    """Compare a distribution's requirement on the framework with the version that runs.

    Returns:
        `AVAILABLE`, perhaps with a remark; or `INVALID` or `INCOMPATIBLE` with the reason.
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
