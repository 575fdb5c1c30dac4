"""The installed plugins by metadata alone: found, attributed, disabled, de-duplicated, gated.

This file decides every status that can be known without an import. It raises nothing for what
an environment holds: foreign metadata is read through the containment that `plugins` passes
in, and what cannot be read becomes a status with a reason.
"""

from __future__ import annotations

import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .info import Contain, Failure, PluginInfo, Status

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import Distribution, EntryPoint

    from pluggy import PluginManager

PLUGINS = "qcore.plugins"  #: entry points: name -> module
INDEX = "qcore.model_types"  #: entry points: model_type -> module of a plugin
FRAMEWORK = "qcore-framework"
DISABLE = "QCORE_DISABLE_PLUGINS"


class Identity(NamedTuple):
    """Whose entry point it is, and what its distribution requires."""

    distribution: str = "(unnamed)"
    version: str = "(no version)"
    requires: tuple[str, ...] = ()


class Candidate:
    """One entry point of `PLUGINS` on its way from metadata to a loaded plugin.

    `plugins` fills `manager` and `records` when it loads; `reject` gives the status that keeps
    a candidate from use.
    """

    def __init__(self, name: str, module: str, identity: Identity) -> None:
        self.name = name
        self.module = module
        self.identity = identity
        self.model_types: list[str] = []
        self.status = Status.AVAILABLE
        self.reason: str | None = None
        self.gated = False
        self.manager: PluginManager | None = None
        self.records: list[Any] = []

    @property
    def key(self) -> tuple[str, str, str]:
        """What fixes the order: name, then distribution, then module."""
        return self.name, self.identity.distribution, self.module

    @property
    def info(self) -> PluginInfo:
        """A snapshot."""
        return PluginInfo(
            name=self.name,
            distribution=self.identity.distribution,
            version=self.identity.version,
            module=self.module,
            status=self.status,
            reason=self.reason,
            model_types=tuple(sorted(self.model_types)),
        )

    def reject(self, status: Status, reason: str) -> None:
        """Take it out of use and say why, on one line."""
        self.status, self.reason = status, " ".join(reason.split())


def catalogue(points: Iterable[EntryPoint] | None, contain: Contain) -> list[Candidate]:
    """The plugins among `points` (``None``: of the environment), the gate not yet applied.

    The index is met with the plugins here: an entry of `INDEX` whose module is no plugin of
    the same distribution is a candidate of its own, invalid.
    """
    unreadable: list[Candidate] = []
    if points is None:
        points, unreadable = _installed(contain)
    identities: dict[int, Identity] = {}
    plugins: list[Candidate] = []
    index: list[Candidate] = []
    for point in points:
        if point.group not in (PLUGINS, INDEX):
            continue
        dist = point.dist
        if id(dist) not in identities:
            identities[id(dist)] = identity_of(dist, contain)
        candidate = Candidate(point.name, point.value.strip(), identities[id(dist)])
        if point.group == INDEX:
            index.append(candidate)
            continue
        plugins.append(candidate)
        if not all(part.isidentifier() for part in candidate.module.split(".")):
            candidate.reject(Status.INVALID, f"'{candidate.module}' is not a module")
    plugins.extend(_meet(index, plugins))
    _disable(plugins)
    _mark_duplicates(plugins)
    return plugins + unreadable


def _meet(index: list[Candidate], plugins: list[Candidate]) -> list[Candidate]:
    """Hand the index to the plugins; what fits none is returned, invalid."""
    strays = []
    for entry in index:
        owners = [
            plugin
            for plugin in plugins
            if (plugin.module, plugin.identity) == (entry.module, entry.identity)
        ]
        for owner in owners:
            owner.model_types.append(entry.name)
        if not owners:
            entry.model_types.append(entry.name)
            entry.reject(
                Status.INVALID,
                f"{INDEX} names module '{entry.module}', which is no plugin of its distribution",
            )
            strays.append(entry)
    return strays


def _installed(contain: Contain) -> tuple[list[EntryPoint], list[Candidate]]:
    """Entry points of the environment, and distributions whose entry points cannot be read."""
    from importlib import metadata

    every = contain(metadata.entry_points)
    if not isinstance(every, Failure):
        return [*every.select(group=PLUGINS), *every.select(group=INDEX)], []
    # One unreadable distribution spoils the common call: read each alone, to name the culprit.
    points: list[EntryPoint] = []
    unreadable: list[Candidate] = []
    seen: set[str] = set()
    for dist in metadata.distributions():
        identity = identity_of(dist, contain)
        if (name := normal(identity.distribution)) in seen:
            continue
        seen.add(name)
        own = contain(partial(_entry_points, dist))
        if not isinstance(own, Failure):
            points.extend(own)
            continue
        text = contain(partial(dist.read_text, "entry_points.txt"))
        if isinstance(text, Failure) or "qcore." in (text or ""):
            candidate = Candidate(identity.distribution, "", identity)
            candidate.reject(Status.BROKEN, f"entry_points.txt cannot be read: {own}")
            unreadable.append(candidate)
    return points, unreadable


def _entry_points(dist: Distribution) -> list[EntryPoint]:
    return list(dist.entry_points)


def identity_of(dist: Distribution | None, contain: Contain) -> Identity:
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

    found = contain(read)
    return Identity() if isinstance(found, Failure) else found


def _disable(plugins: list[Candidate]) -> None:
    """By plugin or by distribution: only the latter tells two of one name apart."""
    names = {normal(name) for name in os.environ.get(DISABLE, "").split(",") if name.strip()}
    for plugin in plugins:
        if names & {normal(plugin.name), normal(plugin.identity.distribution)}:
            plugin.reject(Status.DISABLED, f"named in {DISABLE}")


def _mark_duplicates(plugins: list[Candidate]) -> None:
    """None of several with one name or one module is used: which one would be a guess."""
    live = [plugin for plugin in plugins if plugin.status is Status.AVAILABLE]
    for what in ("name", "module"):
        groups: dict[str, list[Candidate]] = {}
        for plugin in live:
            groups.setdefault(getattr(plugin, what), []).append(plugin)
        for value, group in groups.items():
            for plugin in group:
                twins = ", ".join(sorted(str(twin.info) for twin in group if twin is not plugin))
                if twins and plugin.status is Status.AVAILABLE:
                    plugin.reject(Status.DUPLICATE, f"{what} '{value}' is also that of {twins}")


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def gate(plugin: Candidate, contain: Contain) -> None:
    """Compare the distribution's requirement on the framework with the one that runs.

    Apart from discovery because it imports packaging, which ``qcore --help`` must not pay for.
    """
    if plugin.gated or plugin.status is not Status.AVAILABLE:
        return
    plugin.gated = True
    ours = [
        line
        for line in plugin.identity.requires
        if normal(re.split(r"[^A-Za-z0-9._-]", line.strip(), maxsplit=1)[0]) == FRAMEWORK
    ]
    if not ours:
        plugin.reason = f"does not say which {FRAMEWORK} it needs"
        return
    unmet = contain(partial(_unmet, ours))
    if isinstance(unmet, Failure):
        plugin.reject(Status.INVALID, f"its requirement on {FRAMEWORK} does not parse: {unmet}")
    elif unmet is not None:
        plugin.reject(Status.INCOMPATIBLE, unmet)


def _unmet(requirements: list[str]) -> str | None:
    from packaging.requirements import Requirement

    from ..io.version import __version__

    for line in requirements:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        if not need.specifier.contains(__version__, prereleases=True):
            return f"requires {FRAMEWORK}{need.specifier}, installed is {__version__}"
    return None
