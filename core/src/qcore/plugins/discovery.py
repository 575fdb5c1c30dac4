"""Lists plugins and the model types that they serve, from metadata: disabled, duplicate, invalid.

This file decides every status of a plugin that can be known without an import: disabled by the
user, a name or module that two plugins claim, an index entry (model type -> plugin) that fits no
plugin, a version that does not match. It raises nothing for what an environment holds.
`qcore.io.entry_points` reads the entry points, those of all groups; `qcore.plugins.manager` imports
the plugins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..io.entry_points import (
    DISABLE,
    INDEX,
    PLUGINS,
    Entry,
    Identities,
    Identity,
    Status,
    disabled_names,
    gate,
    normal,
    read_points,
)
from .info import PluginInfo

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import EntryPoint

    from pluggy import PluginManager


class Candidate:
    """One entry point of `PLUGINS` on its way from metadata to a loaded plugin.

    `manager` fills `manager` and `records` when it loads; `reject` gives the status that keeps
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

    def check_version(self) -> None:
        """Apply the version gate, once.

        Apart from discovery because it imports packaging, which ``qcore --help`` must not pay for.
        """
        if self.gated or self.status is not Status.AVAILABLE:
            return
        self.gated = True
        status, reason = gate(self.identity)
        if status is Status.AVAILABLE:
            self.reason = reason
        else:
            self.reject(status, reason or "")


def catalogue(points: Iterable[EntryPoint] | None) -> list[Candidate]:
    """The plugins among `points` (``None``: of the environment), the gate not yet applied.

    The index is met with the plugins here: an entry of `INDEX` whose module is no plugin of
    the same distribution is a candidate of its own, invalid.
    """
    unreadable: list[Entry] = []
    if points is None:
        points, unreadable = read_points((PLUGINS, INDEX))
    identities = Identities()
    plugins: list[Candidate] = []
    index: list[Candidate] = []
    for point in points:
        if point.group not in (PLUGINS, INDEX):
            continue
        candidate = Candidate(point.name, point.value.strip(), identities[point])
        if point.group == INDEX:
            index.append(candidate)
            continue
        plugins.append(candidate)
        if not all(part.isidentifier() for part in candidate.module.split(".")):
            candidate.reject(Status.INVALID, f"'{candidate.module}' is not a module")
    plugins.extend(_meet(index, plugins))
    _disable(plugins)
    _mark_duplicates(plugins)
    return plugins + [_unreadable(entry) for entry in unreadable]


def _unreadable(entry: Entry) -> Candidate:
    candidate = Candidate(entry.name, entry.value, entry.identity)
    candidate.reject(entry.status, entry.reason or "")
    return candidate


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


def _disable(plugins: list[Candidate]) -> None:
    """By plugin or by distribution: only the latter tells two of one name apart."""
    names = disabled_names()
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
