"""Imports plugins and calls their hooks: a failed import is a status, a failed hook is an error.

This file decides what is imported, whether its hooks are sound, and how they are called.
Discovery never raises: a plugin that cannot be imported is `Status.BROKEN`, with the exception as
its reason, and other plugins are used. Use never degrades: a plugin that fails in a hook stops the
verb with its name, and so does an unusable one that serves the model type in use
(``QC-PLUGIN-001``).

Every plugin has a manager of its own, so no plugin can wrap, reorder or swallow another's
answers, and a registration that fails leaves nothing behind. Calls are made by `Plugins.ask`
alone; generators are listed inside the containment, because they raise late.

What metadata alone shows is decided by `discovery`; what the answers mean is left to others:
`detect` judges claims, preflight orders findings. An installed package that is malicious
cannot be contained in-process, nor can one that hangs or ends the process below Python.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import Failure, PluginError, QcoreError, contained
from ..io.entry_points import DISABLE, INDEX, Status
from .discovery import Candidate, catalogue
from .info import Described, Owned, PluginInfo

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint
    from types import ModuleType

    from ..api.records import Generation, Modality

__all__ = ["Described", "Owned", "PluginInfo", "Plugins", "Status"]

_MAX_ANSWERS = 10_000  # a generator that never ends is a failure, not a hang


class Plugins:
    """The installed plugins, or those of one model type. Build with `Plugins.discover`.

    Attributes:
        installed: all of them, also where this set is the scope of one model type.
    """

    def __init__(
        self,
        plugins: Iterable[Candidate],
        model_type: str | None = None,
        installed: Plugins | None = None,
    ) -> None:
        self._plugins = sorted(plugins, key=lambda plugin: plugin.key)
        self._model_type = model_type
        self.installed = self if installed is None else installed

    @classmethod
    def discover(cls, entry_points: Iterable[EntryPoint] | None = None) -> Plugins:
        """Find the plugins by metadata alone: nothing is imported, nothing raised.

        Args:
            entry_points: used instead of the environment's.
        """
        return cls(catalogue(entry_points))

    @property
    def infos(self) -> list[PluginInfo]:
        """Every plugin in name order, the version gate applied. Imports and raises nothing."""
        for plugin in self._plugins:
            plugin.check_version()
        return [plugin.info for plugin in self._plugins]

    @property
    def model_types(self) -> dict[str, tuple[PluginInfo, ...]]:
        """The index: model type to the plugins that name it, whatever their status."""
        types = sorted({kind for plugin in self._plugins for kind in plugin.model_types})
        return {
            kind: tuple(p.info for p in self._plugins if kind in p.model_types) for kind in types
        }

    def for_model_type(self, model_type: str) -> Plugins:
        """Load the plugins that index `model_type`, and nothing else.

        Raises:
            PluginError: ``QC-PLUGIN-001`` when one of them cannot be used. A disabled one is
                left out: that is what the user asked for.
        """
        chosen = [plugin for plugin in self._plugins if model_type in plugin.model_types]
        for plugin in chosen:
            _load(plugin)
            if plugin.status not in (Status.LOADED, Status.DISABLED):
                raise PluginError(
                    "QC-PLUGIN-001",
                    f"{plugin.info} serves model type '{model_type}' but is {plugin.status.value}",
                    found=plugin.reason,
                    fix=_remedy(plugin),
                )
        return Plugins(chosen, model_type, self.installed)

    def load_all(self) -> Plugins:
        """Load every plugin that may be; the others keep their status. Raises nothing."""
        for plugin in self._plugins:
            _load(plugin)
        return self

    def ask(self, hook: str, **arguments: Any) -> list[tuple[PluginInfo, Any]]:
        """Answers to one hook, in name order, each with the plugin that gave it.

        Every usable plugin of this set is loaded and asked. An error that a plugin raises on
        purpose (`QcoreError`: a config it cannot accept) passes as it is.

        Raises:
            PluginError: ``QC-PLUGIN-002`` a plugin raised, ``-003`` it answered with
                something that the hook does not yield.
        """
        return [
            (plugin.info, answer)
            for plugin in self._loaded()
            for answer in _answers(plugin, hook, arguments)
        ]

    def survey(
        self, hook: str, **arguments: Any
    ) -> Iterator[tuple[PluginInfo, list[Any] | QcoreError]]:
        """As `ask`, for reports that must go on: a plugin's failure stands beside its name."""
        for plugin in self._loaded():
            try:
                yield plugin.info, _answers(plugin, hook, arguments)
            except QcoreError as error:
                yield plugin.info, error

    def records(self) -> list[Owned[Any]]:
        """What the loadable plugins of this set describe, in name order. Raises nothing.

        Every function on a record is contained like a hook.
        """
        return [
            Owned(plugin.info, _guarded(plugin, record))
            for plugin in self._loaded()
            for record in plugin.records
        ]

    def describe(self) -> Described:
        """Architectures, generations and modalities by name, each with its plugin.

        In a scope of `for_model_type`: those that serve the model type.

        Raises:
            PluginError: ``QC-PLUGIN-004`` when two plugins bring the same name.
        """
        from ..api.records import Architecture, Generation, Modality

        records = self.records()
        architectures = _by_name(
            owned
            for owned in records
            if isinstance(owned.record, Architecture)
            and self._model_type in (None, *owned.record.model_types)
        )

        def serving(kind: type[Generation] | type[Modality]) -> dict[str, Owned[Any]]:
            return _by_name(
                owned
                for owned in records
                if isinstance(owned.record, kind)
                and (self._model_type is None or set(owned.record.architectures) & {*architectures})
            )

        return Described(
            architectures=architectures,
            generations=serving(Generation),
            modalities=serving(Modality),
        )

    def _loaded(self) -> list[Candidate]:
        self.load_all()
        return [plugin for plugin in self._plugins if plugin.status is Status.LOADED]


def _by_name(records: Iterable[Owned[Any]]) -> dict[str, Owned[Any]]:
    result: dict[str, Owned[Any]] = {}
    for owned in records:
        name = owned.record.name
        if name in result:
            raise PluginError(
                "QC-PLUGIN-004",
                f"{type(owned.record).__name__.lower()} '{name}' is brought twice",
                found=f"{result[name].plugin} and {owned.plugin}",
                fix=f"uninstall one of them, or set {DISABLE} to its distribution",
            )
        result[name] = owned
    return result


# Loading: import, audit of the hooks, description.


def _load(plugin: Candidate) -> None:
    plugin.check_version()
    if plugin.status is not Status.AVAILABLE:
        return
    import importlib

    module = contained(partial(importlib.import_module, plugin.module))
    if isinstance(module, Failure):
        plugin.reject(Status.BROKEN, f"import of {plugin.module} fails: {module}")
        return
    problem = contained(partial(_register, plugin, module))
    if problem is not None:
        plugin.reject(Status.INVALID, str(problem))
        return
    try:
        plugin.records = _answers(plugin, "qcore_describe", {})
    except QcoreError as error:
        wrong = error.code == "QC-PLUGIN-003"
        plugin.reject(Status.INVALID if wrong else Status.BROKEN, error.message)
        return
    if outside := _outside_index(plugin):
        plugin.reject(Status.INVALID, outside)
        return
    plugin.status = Status.LOADED


def _register(plugin: Candidate, module: ModuleType) -> str | None:
    """Give the plugin its manager, or say what is wrong with its hooks."""
    import difflib
    import inspect

    import pluggy

    from ..api import hookspecs

    manager = pluggy.PluginManager("qcore")
    manager.add_hookspecs(hookspecs)
    known = [name for name in vars(hookspecs) if name.startswith("qcore_")]
    implemented = False
    for name in dir(module):
        options = manager.parse_hookimpl_opts(module, name)
        if options is None:
            # pluggy passes over these in silence: the plugin would have no effect.
            if name.startswith("qcore_") and inspect.isroutine(getattr(module, name)):
                return f"function '{name}' is not decorated with @hookimpl"
            continue
        implemented = True
        hook = options["specname"] or name
        if hook in hookspecs.RENAMED:
            return f"hook '{hook}' is now called '{hookspecs.RENAMED[hook]}'"
        if options["wrapper"] or options["hookwrapper"]:
            return f"hook '{name}' is a wrapper, which could swallow others' answers"
        if hook not in known and not options["optionalhook"]:
            near = difflib.get_close_matches(hook, known, 1)
            hint = f", did you mean '{near[0]}'" if near else ""
            return f"hook '{hook}' is not known{hint}"
    if not implemented:
        return "implements no hook"
    manager.register(module, plugin.name)
    manager.check_pending()
    plugin.manager = manager
    return None


def _outside_index(plugin: Candidate) -> str | None:
    from ..api.records import Architecture

    for record in plugin.records:
        if isinstance(record, Architecture):
            for model_type in record.model_types:
                if model_type not in plugin.model_types:
                    return (
                        f"architecture '{record.name}' claims model type '{model_type}', "
                        f"which the distribution does not name under {INDEX}"
                    )
    return None


# Asking.


def _answers(plugin: Candidate, hook: str, arguments: Mapping[str, Any]) -> list[Any]:
    """One plugin's answers, listed and checked."""
    assert plugin.manager is not None
    caller = getattr(plugin.manager.hook, hook)
    expected = _yields(hook)

    def call() -> list[Any] | Failure:
        answers: list[Any] = []
        results = caller(**arguments)
        # pluggy drops None, which a forgotten `return` or `yield` gives.
        if len(results) < len(caller.get_hookimpls()):
            return Failure("returned None")
        for result in results:
            if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping):
                return Failure(f"returned {type(result).__name__}")
            answers.extend(itertools.islice(result, _MAX_ANSWERS + 1))
        if len(answers) > _MAX_ANSWERS:
            return Failure(f"gave more than {_MAX_ANSWERS} answers")
        return next((wrong for answer in answers if (wrong := misfit(answer))), answers)

    def misfit(answer: object) -> Failure | None:
        from .record_check import problem

        if not isinstance(answer, expected):
            return Failure(f"yielded {type(answer).__name__}")
        wrong = problem(answer)
        return None if wrong is None else Failure(f"yielded {wrong}")

    found = contained(call)
    if not isinstance(found, Failure):
        return found
    if isinstance(found.error, QcoreError):
        raise found.error
    names = " or ".join(kind.__name__ for kind in expected)
    raised = found.error is not None
    raise PluginError(
        "QC-PLUGIN-002" if raised else "QC-PLUGIN-003",
        f"{plugin.info} {'failed' if raised else 'answered wrongly'} in {hook}",
        found=found,
        expected=None if raised else f"an iterable of {names}",
        fix=_remedy(plugin),
    ) from found.error


@dataclass(frozen=True, slots=True)
class Owner:
    """Who is to blame for an object that a record's callable made.

    Attributes:
        name: the plugin in words.
        remedy: what the user can do about it.
    """

    name: str
    remedy: str | None = None


def owner_of(function: Callable[..., Any]) -> Owner:
    """The plugin whose record holds `function`; its module, if it comes from no plugin."""
    if isinstance(function, _Guarded):
        return Owner(str(function.plugin.info), _remedy(function.plugin))
    return Owner(f"module '{getattr(function, '__module__', None)}'")


@dataclass(frozen=True, slots=True)
class _Guarded:
    """A function on a record that names its plugin when it fails; equal where the function is."""

    function: Callable[..., Any]
    what: str
    plugin: Candidate = field(compare=False)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        found = contained(partial(self.function, *arguments, **named))
        if not isinstance(found, Failure):
            return found
        if isinstance(found.error, QcoreError):
            raise found.error
        raise PluginError(
            "QC-PLUGIN-002",
            f"{self.plugin.info} failed in {self.what}",
            found=found,
            fix=_remedy(self.plugin),
        ) from found.error


def _guarded(plugin: Candidate, record: Any) -> Any:
    """The record with every function on it contained, by the annotations of its class."""
    from .record_check import callable_fields

    kind: Any = type(record)
    guarded = {
        name: _Guarded(function, f"{name} of {getattr(record, 'name', kind.__name__)}", plugin)
        for name in callable_fields(kind)
        if (function := getattr(record, name)) is not None
    }
    return replace(record, **guarded) if guarded else record


def _yields(hook: str) -> tuple[type, ...]:
    """Record types of a hook, read off its specification so that there is one list of them."""
    import typing

    from ..api import hookspecs

    hints = typing.get_type_hints(getattr(hookspecs, hook))
    (answer,) = typing.get_args(hints["return"])
    return typing.get_args(answer) or (answer,)


def _remedy(plugin: Candidate) -> str:
    name = plugin.identity.distribution
    return f"update or uninstall {name}, or leave it out with {DISABLE}={plugin.name}"
