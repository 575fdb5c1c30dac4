"""How reports describe a plugin: `PluginInfo` (name, version, status, reason) and its records.

This file decides how plugins are described to the rest of core. The statuses (available, loaded,
disabled, incompatible, duplicate, broken, invalid) are those of `qcore.io.entry_points.Status`.
Nothing here reads metadata or imports a plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ..io.entry_points import Status

if TYPE_CHECKING:
    from ..api.records import Architecture, Generation, Modality

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """A plugin as reports show it; a snapshot.

    Attributes:
        name: entry-point name.
        distribution: what to install or uninstall.
        version: of the distribution.
        module: what it imports.
        status: see `Status`.
        reason: why it is not usable, or a remark; ``None`` when there is nothing to say.
        model_types: what it indexes.
    """

    name: str
    distribution: str
    version: str
    module: str
    status: Status
    reason: str | None = None
    model_types: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"plugin '{self.name}' ({self.distribution} {self.version})"

    @property
    def usable(self) -> bool:
        """Whether it is, or may still become, loaded."""
        return self.status in (Status.AVAILABLE, Status.LOADED)


@dataclass(frozen=True, slots=True)
class Owned(Generic[_R]):
    """A record and the plugin that brought it."""

    plugin: PluginInfo
    record: _R


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What the plugins of a scope bring, by name."""

    architectures: Mapping[str, Owned[Architecture]]
    generations: Mapping[str, Owned[Generation]]
    modalities: Mapping[str, Owned[Modality]]
