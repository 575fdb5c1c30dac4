"""What all verbs share: how an error and a result are printed, ``--debug`` and ``--json``."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from ..errors import PreflightError, QcoreError, UsageError

KINDS = "qcore.media_kinds"  #: entry points of plugins: type of a content part -> module

_F = TypeVar("_F", bound=Callable[..., Any])


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


def fail(error: QcoreError, *, as_json: bool) -> int:
    """Print an error, one line for each finding; returns the exit status."""
    if as_json:
        emit({"error": error.as_json()})
        return error.exit_code
    errors = error.errors if isinstance(error, PreflightError) else (error,)
    for one in errors:
        fix = f". Fix: {one.fix}" if one.fix else ""
        click.echo(f"error[{one.code}] {one.message}{fix}", err=True)
    return error.exit_code


@contextmanager
def importing() -> Iterator[None]:
    """Hold SIGINT back while torch is imported: its import swallows KeyboardInterrupt."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def check_arguments(arguments: list[str]) -> None:
    """What click lets pass: bytes that are no text, and an option that is given twice.

    Raises:
        UsageError: ``QC-CLI-003`` or ``-004``.
    """
    seen: set[str] = set()
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise UsageError("QC-CLI-003", "is not UTF-8", field=shown, fix="name it in UTF-8")
        name = argument.partition("=")[0]
        if name in seen and name not in _repeatable():
            raise UsageError("QC-CLI-004", "is given twice", field=name, fix="give it once")
        if (
            name.startswith("--")
            and len(name) > 2
            and name not in ("--set", "--chat-template-kwargs", "--kernels", "--gpu")
        ):
            seen.add(name)


def _repeatable() -> set[str]:
    """Options of media, of which a turn may have several; looked up where one is given twice."""
    from importlib.metadata import entry_points

    return {f"--{point.name}" for point in entry_points(group=KINDS)}


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
