"""What is known of a plugin: its status, its identity, and what it brought.

The words in which `plugins` and `plugin_catalog` speak of plugins to the rest of core. Nothing
here reads metadata or imports a plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ..errors import Failure as Failure

if TYPE_CHECKING:
    from ..api.records import Architecture, Generation, Modality

_T = TypeVar("_T")
_R = TypeVar("_R")


class Status(str, Enum):
    """What became of a plugin. Only `LOADED` ones are ever asked."""

    AVAILABLE = "available"  #: installed and compatible; not imported yet
    LOADED = "loaded"  #: imported, and its hooks are sound
    DISABLED = "disabled"  #: named in QCORE_DISABLE_PLUGINS
    INCOMPATIBLE = "incompatible"  #: requires another version of qcore-framework
    DUPLICATE = "duplicate"  #: its name or its module is claimed twice; none of them is used
    BROKEN = "broken"  #: its metadata, its import or its description raises
    INVALID = "invalid"  #: it breaks the contract of hooks, records or index


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


class Contain(Protocol):
    """Calls foreign code and turns what it raises into a `Failure`: `errors.contained`."""

    def __call__(self, call: Callable[[], _T], /) -> _T | Failure: ...
