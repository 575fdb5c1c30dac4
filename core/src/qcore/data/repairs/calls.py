"""Tool calls against `tools`: undeclared functions, arguments that do not fit their schema.

This file decides what is reported of a call beside the functions that the row declares. A column
format writes integers as doubles where another row has a fraction: they become integers again
where the schema says so. Nulls of column formats are removed by `qcore.data.repairs.padding`.

Codes: ``QC-DATA-057`` functions that `tools` does not declare or that are not called, ``-058`` an
argument that its schema does not list or that does not fit it, or a double that became an integer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .notes import Notes, PlacedMessage, function_of, functions_of
from .padding import arguments_of, lists, properties_of

UNDECLARED, MISFIT = "QC-DATA-057", "QC-DATA-058"
_EXACT = 2**53  #: up to here every integer is a double
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict,
    "array": list, "null": type(None),
}  # fmt: skip


def write_whole_numbers(
    turns: list[PlacedMessage], tools: Any, notes: Notes
) -> list[PlacedMessage]:
    """Make integers of doubles that are whole numbers where the schema says integer.

    Column formats write a column of integers and fractions as doubles. A double beyond 2**53 may
    be another number than was written and is left as it is.

    Args:
        turns: the row's turns.
        tools: its function descriptions.
        notes: receives the findings.
    """
    declared = functions_of(tools)
    made = []
    for turn in turns:
        calls = [_with_integers(call, declared) for call in turn.calls]
        if all(call is before for call, before in zip(calls, turn.calls)):
            made.append(turn)
            continue
        notes.note(MISFIT, f"{turn.at}.tool_calls", "whole numbers written as doubles: integers")
        made.append(turn.but(tool_calls=calls))
    return made


def _with_integers(call: Any, declared: Mapping[str, Mapping[str, Any]]) -> Any:
    function = function_of(call)
    described = declared.get(function["name"]) if function is not None else None
    if function is None or described is None:
        return call
    given = function.get("arguments")
    arguments = _integers(given, described.get("parameters"))
    if arguments is given:
        return call
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed


def _integers(value: Any, schema: Any) -> Any:
    """A value with integers where its schema says so; the same object if nothing changes."""
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) <= _EXACT and _says_integer(schema)
        return int(value) if whole else value
    made: Any = value
    if isinstance(value, dict):
        properties = properties_of(schema)
        made = {key: _integers(item, properties.get(key)) for key, item in value.items()}
        same = all(made[key] is item for key, item in value.items())
    elif isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        made = [_integers(item, items) for item in value]
        same = all(item is before for item, before in zip(made, value))
    else:
        same = True
    return value if same else made


def _says_integer(schema: Any) -> bool:
    """Whether a schema allows integers and no other numbers."""
    if not isinstance(schema, dict):
        return False
    named = schema.get("type")
    types = [named] if isinstance(named, str) else named
    if isinstance(types, list):
        return "integer" in types and "number" not in types
    choices = next(
        (schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)), ()
    )
    kinds = [one.get("type") for one in choices if isinstance(one, dict)]
    return "integer" in kinds and "number" not in kinds


def check_calls(turns: Sequence[PlacedMessage], tools: Any, notes: Notes) -> None:
    """Report functions that are called and not declared, or declared and not called.

    Raises:
        RowError: ``QC-DATA-057`` or ``-058``, if its warnings refuse a row.
    """
    declared = functions_of(tools)
    called: set[str] = set()
    for turn in turns:
        for number, call in enumerate(turn.calls):
            function = function_of(call)
            if function is None:
                continue
            name, at = function["name"], f"{turn.at}.tool_calls[{number}]"
            if name in declared:
                _check_types(declared[name], call, at, notes)
            elif name not in called:
                what = f"calls {name!r}, which tools does not declare"
                notes.warn(
                    UNDECLARED, at,
                    what if declared else f"calls {name!r}, but the row has no tools: the model "
                    "is trained to call a function that its prompt does not describe",
                    f"add {name} to tools",
                )  # fmt: skip
            called.add(name)
    unused = [name for name in declared if name not in called]
    if unused and called:
        notes.note(UNDECLARED, "tools", f"declared and not called: {', '.join(unused)[:120]}")
    elif unused:
        notes.note(UNDECLARED, "tools", "no turn calls a function")


def _check_types(described: Mapping[str, Any], call: Any, at: str, notes: Notes) -> None:
    """Report values whose type is not the one that the schema names."""
    parameters = described.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    for key, value in arguments_of(call).items():
        if properties and lists(parameters, key) and key not in properties_of(parameters):
            notes.warn(
                MISFIT,
                f"{at}.{key}",
                "an argument that the schema of the function does not list: a server reads it as "
                "a string",
                f"add {key} to the properties of the function, or correct its name",
            )
            continue
        schema = properties.get(key) if isinstance(properties, dict) else None
        named = schema.get("type") if isinstance(schema, dict) else None
        wanted = [named] if isinstance(named, str) else named
        if not isinstance(wanted, list) or not wanted:
            continue
        if any(_is_kind(value, one) for one in wanted) or (
            value is None and isinstance(schema, dict) and schema.get("nullable") is True
        ):
            continue
        notes.warn(
            MISFIT,
            f"{at}.{key}",
            f"{_kind(value)} for an argument of type {' or '.join(map(str, wanted))}: a server "
            "reads the call with the type of the schema",
            "write the value in the type of the schema, or correct the schema",
        )


def _is_kind(value: Any, named: Any) -> bool:
    kinds = _KINDS.get(named) if isinstance(named, str) else None
    if kinds is None:
        return True  # a type that is not JSON Schema's says nothing
    if isinstance(value, bool):
        return bool(named == "boolean")
    if named == "integer" and isinstance(value, float):
        return value.is_integer() and abs(value) <= _EXACT
    return isinstance(value, kinds)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    names = {"str": "a string", "int": "an integer", "float": "a number", "dict": "an object",
             "list": "a list"}  # fmt: skip
    return names.get(type(value).__name__, "null")
