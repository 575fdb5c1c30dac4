"""Runtime type check of the records that plugins yield, by the annotations of their fields.

Type checkers see a plugin's own code; core sees what arrives. This file decides the check of
the fields of a frozen record, nested records included, so that a wrong field is the plugin's
named fault and not a traceback somewhere in core; and which fields hold functions of the plugin,
which `manager` contains. It knows the few forms of annotation that records use and passes over
any other.
"""

from __future__ import annotations

import builtins
import collections.abc
import sys
import types
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any


class _Names(dict[str, Any]):
    """Names for evaluating annotations; those imported for type checkers only mean anything."""

    def __init__(self, module: str) -> None:
        super().__init__(vars(sys.modules[module]))

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, localns=_Names(kind.__module__))
    return {item.name: hints[item.name] for item in fields(kind)}


@cache
def callable_fields(kind: Any) -> tuple[str, ...]:
    """Fields of a record class that are annotated as a function, or as one or ``None``."""
    return tuple(name for name, hint in _hints(kind).items() if _is_callable(hint))


def _is_callable(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(map(_is_callable, typing.get_args(hint)))
    if getattr(hint, "_is_protocol", False):
        return "__call__" in vars(hint)
    return typing.get_origin(hint) is collections.abc.Callable


def problem(record: Any) -> str | None:
    """The first field that is not what its annotation says, or ``None``."""
    kind: Any = type(record)
    for name, hint in _hints(kind).items():
        value = getattr(record, name)
        if not _fits(value, hint):
            return f"{kind.__name__} whose {name} is {_name(value)}"
    return None


def _name(value: Any) -> str:
    if isinstance(value, tuple | list) and value:
        return f"{type(value).__name__} of {type(value[0]).__name__}"
    return type(value).__name__


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return (
            isinstance(value, tuple)
            and len(value) == len(arguments)
            and all(map(_fits, value, arguments))
        )
    if origin is collections.abc.Mapping:
        return isinstance(value, collections.abc.Mapping) and all(
            _fits(key, arguments[0]) and _fits(item, arguments[1]) for key, item in value.items()
        )
    if _is_callable(hint):
        return callable(value)
    if hint is None or hint is types.NoneType:
        return value is None
    if not isinstance(hint, type):
        return True
    if hint is int and isinstance(value, bool):
        return False
    return isinstance(value, hint) and (not is_dataclass(hint) or problem(value) is None)
