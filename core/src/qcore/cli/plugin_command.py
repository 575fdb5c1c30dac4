"""Commands that plugins add to ``qcore``: listed from metadata, imported and contained when run.

This file decides which exceptions of a plugin's command pass (those of click and of qcore) and how
any other one names the command and its distribution. How an error is printed is left to `main`.

Codes: ``QC-PLUGIN-020`` a command that cannot be used (disabled, incompatible, brought twice),
cannot be imported or is no command, ``-021`` one that raised.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import click

from ..errors import Failure, PluginError, QcoreError, contained
from ..io.entry_points import COMMANDS, Entry, Status, entries, usable
from .common import check_repeats
from .output import OutputError

_PASSING = (QcoreError, click.ClickException, click.exceptions.Exit, click.Abort, OutputError)
_T = TypeVar("_T")


def listed(reserved: Container[str]) -> dict[str, Entry]:
    """The commands that ``--help`` lists, by name, in name order; nothing is imported.

    The version gate, which costs an import of packaging, is left to `find`.

    Args:
        reserved: names that stay core's own.
    """
    found = usable(COMMANDS, gated=False)
    return {entry.name: entry for entry in found if entry.name not in reserved}


def find(name: str) -> PluginCommand | None:
    """The command of this name; ``None`` where no plugin brings one.

    Raises:
        PluginError: ``QC-PLUGIN-020``.
    """
    if not any(entry.name == name for entry in entries(COMMANDS, gated=False)):
        return None
    found = [entry for entry in entries(COMMANDS) if entry.name == name]
    return PluginCommand(min(found, key=lambda entry: entry.status is not Status.AVAILABLE))


class PluginCommand(click.Command):
    """A plugin's command under core's group; it parses its arguments when it is invoked.

    Args:
        entry: names the command: ``module:attribute``, by default the attribute ``command``.

    Raises:
        PluginError: ``QC-PLUGIN-020``.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry.name)
        self._entry = entry
        if entry.status is not Status.AVAILABLE:
            raise self._error("QC-PLUGIN-020", f"is {entry.status.value}", found=entry.reason)
        self._command = self._load()

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """A context that holds the arguments as they are; for shell completion the plugin's."""
        if extra.get("resilient_parsing"):
            return self._call(
                partial(self._command.make_context, info_name, args, parent=parent, **extra)
            )
        context = click.Context(self, info_name=info_name, parent=parent)
        context.args = args
        return context

    def invoke(self, ctx: click.Context) -> Any:
        """Parse and run.

        Raises:
            PluginError: ``QC-PLUGIN-021``.
            UsageError: ``QC-CLI-004``.
        """

        def run() -> Any:
            check_repeats(self._command, ctx.info_name, ctx.args, ctx.parent)
            with self._command.make_context(ctx.info_name, ctx.args, parent=ctx.parent) as own:
                return self._command.invoke(own)

        return self._call(run)

    def _call(self, call: Callable[[], _T]) -> _T:
        """Call the plugin's code; only what click and qcore understand passes."""
        result = contained(call, prints=True)
        if not isinstance(result, Failure):
            return result
        error = result.error
        if isinstance(error, _PASSING):
            raise error
        if isinstance(error, SystemExit) and not error.code:
            raise click.exceptions.Exit(0) from error
        raise self._error("QC-PLUGIN-021", "failed", found=result) from error

    def _load(self) -> click.Command:
        def load() -> Any:
            module, _, attribute = self._entry.value.partition(":")
            command: Any = import_module(module)
            for name in (attribute or "command").split("."):
                command = getattr(command, name)
            return command

        command = contained(load)
        if isinstance(command, Failure):
            what = "cannot be imported"
            raise self._error("QC-PLUGIN-020", what, found=command) from command.error
        if not isinstance(command, click.Command):
            raise self._error(
                "QC-PLUGIN-020",
                "is not a click command",
                found=type(command).__name__,
                expected="click.Command",
            )
        return command

    def _error(self, code: str, what: str, **facts: Any) -> PluginError:
        identity = self._entry.identity
        return PluginError(
            code,
            f"plugin command '{self.name}' ({identity.distribution} {identity.version}) {what}",
            field=self._entry.value,
            fix=f"update or uninstall {identity.distribution}",
            **facts,
        )
