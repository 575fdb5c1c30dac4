"""What all verbs share: how an error and a result are printed, ``--debug`` and ``--json``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from ..errors import PreflightError, QcoreError

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
    click.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


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


def count(number: int) -> str:
    """A number of parameters as people say it: 873.4 M, 27.8 B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)
