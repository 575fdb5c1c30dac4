"""What all verbs share: how an error and a result are printed, ``--debug`` and ``--json``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import click

from ..errors import PreflightError, QcoreError, UsageError

_F = TypeVar("_F", bound=Callable[..., Any])

#: Parameters that name a folder or a repository of the hub, whose type is a text for click.
_FOLDERS: Final = frozenset(
    ("model", "models", "base", "adapter", "adapters", "init_adapter", "folder", "a", "b")
)
_FOLDER_OR_ID: Final = "a folder or a hub id"


def debugging(arguments: list[str]) -> bool:
    """Whether tracebacks were asked for, by flag or by ``QCORE_DEBUG=1``."""
    return "--debug" in arguments or os.environ.get("QCORE_DEBUG") == "1"


def wants_json(arguments: list[str]) -> bool:
    """Whether ``--json`` stands among the arguments, also where parsing them failed."""
    return "--json" in arguments


def debug_option(command: _F) -> _F:
    """``--debug``: read by `main` before anything is parsed."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")(
        command
    )


def json_option(command: _F) -> _F:
    """``--json``: one JSON object on stdout, nothing else there."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def emit(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    people = sys.stdout is not None and sys.stdout.isatty()  # None: closed before we began
    click.echo(json.dumps(value, indent=2 if people else None, ensure_ascii=False))


def emit_list(value: Mapping[str, Any], key: str, items: Iterable[Mapping[str, Any]]) -> None:
    """As `emit`, with a last key whose list is too long to be held: an item a line."""
    click.echo(f'{json.dumps(value, ensure_ascii=False)[:-1]}, "{key}": [', nl=False)
    separator = "\n"
    for item in items:
        click.echo(separator + json.dumps(item, ensure_ascii=False), nl=False)
        separator = ",\n"
    click.echo("]}")


def fail(error: QcoreError, *, as_json: bool) -> int:
    """Print an error, one line for each finding; returns the exit status."""
    if as_json:
        emit({"error": error.as_json()})
        return error.exit_code
    for each in error.errors if isinstance(error, PreflightError) else (error,):
        click.echo(line_of(each), err=True)
    return error.exit_code


def line_of(error: QcoreError) -> str:
    """An error as one line."""
    stop = "" if error.message.endswith(("?", "!")) else "."
    fix = f"{stop} Fix: {error.fix}" if error.fix else ""
    return f"error[{error.code}] {error.message}{fix}"


def check_text(arguments: list[str]) -> None:
    """Refuse bytes that are no text, which click lets pass.

    Raises:
        UsageError: ``QC-CLI-003``.
    """
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise UsageError("QC-CLI-003", "is not UTF-8", field=shown, fix="name it in UTF-8")


def check_repeats(
    command: click.Command, name: str | None, arguments: list[str], parent: click.Context | None
) -> None:
    """Refuse an option that is given twice, and an empty path.

    Of most options click silently keeps the last value, and an empty path means the current folder
    to `pathlib`: a variable that is not set in a script would write there.

    An option that its command declares with ``multiple=True`` or ``count=True`` may be repeated.
    click's own parser decides which arguments are options; what it rejects is left for click to
    report.

    Args:
        command: the command that will parse `arguments`; of a group, its subcommand as well.
        name: what the user typed for `command`.
        arguments: what follows it on the command line.
        parent: the context of the group that `command` belongs to.

    Raises:
        UsageError: ``QC-CLI-004`` an option is given twice; ``-010`` a path is empty.
    """
    settings = command.context_settings
    context = command.context_class(command, info_name=name, parent=parent, **settings)
    with context.scope(cleanup=False):
        try:
            values, rest, order = command.make_parser(context).parse_args(list(arguments))
        except click.UsageError:
            return
        seen: set[click.Parameter] = set()
        for option in order:
            if not isinstance(option, click.Option) or option.multiple or option.count:
                continue
            if option in seen:
                field = max(option.opts, key=len)
                raise UsageError("QC-CLI-004", "is given twice", field=field, fix="give it once")
            seen.add(option)
        _check_empty_paths(command.params, values)
        if isinstance(command, click.Group) and rest and not command.chain:
            subcommand = command.get_command(context, rest[0])
            if subcommand is not None:
                check_repeats(subcommand, rest[0], rest[1:], context)


def _check_empty_paths(parameters: Iterable[click.Parameter], values: Mapping[str, Any]) -> None:
    for parameter in parameters:
        value = values.get(parameter.name or "")
        path = isinstance(parameter.type, click.Path) or parameter.name in _FOLDERS
        if path and (value == "" or (isinstance(value, list | tuple) and "" in value)):
            option = isinstance(parameter, click.Option)
            field = max(parameter.opts, key=len) if option else parameter.human_readable_name
            raise UsageError(
                "QC-CLI-010",
                "is empty",
                field=field,
                expected="a path" if isinstance(parameter.type, click.Path) else _FOLDER_OR_ID,
                fix="name one; a shell variable that is not set leaves it empty",
            )


@contextmanager
def spoken(flags: Mapping[str, tuple[str, Any]]) -> Iterator[None]:
    """Errors about settings that a flag of its own gave name the flag, as the user typed it."""
    typed = {key: flag for flag, (key, value) in flags.items() if value is not None}
    try:
        yield
    except PreflightError:
        raise
    except UsageError as error:
        if error.field not in typed:
            raise
        raise error.replace(field=typed[error.field]) from None


def count(number: int) -> str:
    """A number of parameters as people say it: 873.4 M, 27.8 B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
