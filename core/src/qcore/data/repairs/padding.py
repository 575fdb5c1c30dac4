"""Null padding in the arguments of tool calls, which column formats write.

This file decides which null in a call's arguments is padding. Arrow gives all calls of a column
the same keys and fills in null; a template would render it as a value. A null is

- dropped, if the function has no such property, or if the row shows padding (nulls in place of
  absent keys of messages, the same keys in calls of different functions, null as the schema of a
  property) and the property is not required;
- kept, if the function has the property and nothing shows padding, if a required property allows
  null, or if the arguments were written as a JSON string, which is never padded;
- refused otherwise: without a description of the function or a sign of padding, both are possible.

Objects inside arguments are padded, too; a null in a list is a value. An object whose schema lists
no properties may have any, so that a null in it is a value unless the row shows padding. Values of
other types are reported by `qcore.data.repairs.calls`.

Code: ``QC-DATA-053``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...api.media import RowError
from .notes import Notes, PlacedMessage, function_of, functions_of

PADDING = "QC-DATA-053"
_MESSAGE_KEYS = (
    "tool_calls", "function_call", "tool_call_id", "name", "reasoning_content", "reasoning",
    "thinking",
)  # fmt: skip


def drop_padding(
    turns: list[PlacedMessage], tools: Any, raw: Any, notes: Notes
) -> list[PlacedMessage]:
    """Remove null arguments that are padding of a column format.

    Args:
        turns: the row's turns.
        tools: its function descriptions.
        raw: the row before it was converted, in which nulls and JSON strings are still seen.
        notes: receives the findings.

    Raises:
        RowError: ``QC-DATA-053`` a null that may be padding or a value.
    """
    calls = [function for turn in turns for call in turn.calls if (function := function_of(call))]
    if not any(_has_null(arguments_of(function)) for function in calls):
        return turns
    written = _written(raw)
    if written and all(isinstance(value, str) for value in written):
        return turns  # arguments as JSON strings: a null in them was written on purpose
    declared = functions_of(tools)
    shown = (_has_null_keys(raw) and not any(isinstance(value, str) for value in written)) or any(
        None in properties_of(one.get("parameters")).values() for one in declared.values()
    )
    padding = _Padding(declared, shown or _same_keys(calls))
    made, first = [], ""
    for turn in turns:
        before = padding.dropped
        kept = [padding.less(call, f"{turn.at}.tool_calls[{number}]")
                for number, call in enumerate(turn.calls)]  # fmt: skip
        made.append(turn if padding.dropped == before else turn.but(tool_calls=kept))
        first = first or (turn.at if padding.dropped else "")
    if count := padding.dropped:
        keys = "argument is" if count == 1 else "arguments are"
        notes.note(PADDING, f"{first}.tool_calls", f"{count} null {keys} column padding: dropped")
    return made


class _Padding:
    """Decides about the nulls of one row.

    Args:
        declared: descriptions of functions by name.
        shown: whether the row shows padding elsewhere.

    Attributes:
        dropped: number of nulls that were dropped.
    """

    def __init__(self, declared: Mapping[str, Mapping[str, Any]], shown: bool) -> None:
        self.declared = declared
        self.shown = shown
        self.dropped = 0

    def less(self, call: Any, at: str) -> Any:
        """The call without its padding."""
        function = function_of(call)
        given = arguments_of(call)
        if function is None or not _has_null(given):
            return call
        described = self.declared.get(function["name"])
        schema = None
        if described is not None:  # a function without properties takes no arguments
            parameters = described.get("parameters")
            schema = {"properties": {}, **(parameters if isinstance(parameters, dict) else {})}
        kept = self._object(given, schema, at, function["name"])
        less = {**function, "arguments": kept}
        return {**call, "function": less} if "function" in call else less

    def _object(self, given: Mapping[str, Any], schema: Any, at: str, name: str) -> dict[str, Any]:
        kept = {}
        for key, value in given.items():
            if value is None and self._is_padding(key, schema, f"{at}.{key}", name):
                self.dropped += 1
            else:
                inner = None if schema is None else properties_of(schema).get(key) or {}
                kept[key] = self._inner(value, inner, f"{at}.{key}", name)
        return kept

    def _inner(self, value: Any, schema: Any, at: str, name: str) -> Any:
        """A value without padding in the objects inside it; nulls in lists are values."""
        if isinstance(value, dict) and _has_null(value):
            return self._object(value, schema, at, name)
        if isinstance(value, list) and _has_null(value):
            items = schema.get("items") or {} if isinstance(schema, dict) else schema
            return [
                self._inner(item, items, f"{at}[{number}]", name)
                for number, item in enumerate(value)
            ]
        return value

    def _is_padding(self, key: str, schema: Any, at: str, name: str) -> bool:
        """Whether a null is padding; `schema` is that of the object, ``None`` without tools."""
        properties = properties_of(schema)
        if schema is None and not self.shown:
            problem = "null, and nothing shows whether it is a value or padding of a column format"
        elif not lists(schema, key):
            return self.shown
        elif properties.get(key) is None:
            return True
        elif not self.shown:
            return False  # a value, even one that does not fit: `check_calls` reports it
        elif key not in _required(schema):
            return True
        elif _allows_null(properties[key]):
            return False
        else:
            problem = f"null in a padded row, and the schema of {name} requires a value"
        raise RowError(
            PADDING,
            f"is {problem}",
            at=at,
            expected="a value, or no such argument",
            fix=f"declare {name} in tools: a null of a property that it does not have is dropped, "
            "any other one is kept; or write arguments as a JSON string: its nulls are kept"
            if schema is None
            else "write the value that the call had",
        )


def _required(schema: Any) -> Sequence[Any]:
    """The properties that an object must have."""
    found = schema.get("required") if isinstance(schema, dict) else None
    return found if isinstance(found, list) else ()


def properties_of(schema: Any) -> Mapping[str, Any]:
    """The properties that the schema of an object lists."""
    found = schema.get("properties") if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else {}


def lists(schema: Any, key: str) -> bool:
    """Whether the schema of an object shows if the object may have a property."""
    if not isinstance(schema, dict) or "properties" not in schema:
        return False
    return key in properties_of(schema) or not schema.get("additionalProperties")


def _has_null(value: Any) -> bool:
    """Whether an object anywhere in a value has a null."""
    if isinstance(value, dict):
        return any(item is None or _has_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_has_null, value))


def arguments_of(call: Any) -> Mapping[str, Any]:
    """The arguments of a call; empty if it is not one, or they are not an object."""
    function = function_of(call)
    given = function.get("arguments") if function is not None else None
    return given if isinstance(given, dict) else {}


def _allows_null(schema: Any) -> bool:
    """Whether a schema allows null, or does not say which types it allows."""
    if not isinstance(schema, dict) or schema.get("nullable") is True:
        return True
    named = schema.get("type")
    if isinstance(named, str | list):
        return named == "null" or (isinstance(named, list) and "null" in named)
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            return any(_allows_null(item) for item in schema[word])
    if isinstance(schema.get("enum"), list):
        return None in schema["enum"]
    return not schema.keys() & {"properties", "items", "const", "allOf"}


def _same_keys(calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether calls of different functions have the same keys, and each null is another's value."""
    given = [(call["name"], arguments_of(call)) for call in calls]
    if len({name for name, _ in given}) < 2 or len({tuple(sorted(keys)) for _, keys in given}) > 1:
        return False
    return all(
        any(others[key] is not None for other, others in given if other != name)
        for name, arguments in given
        for key, value in arguments.items()
        if value is None
    )


def _messages(raw: Any) -> Iterator[Mapping[str, Any]]:
    """Everything in a row that may be a message, in any row format."""
    for value in raw.values() if isinstance(raw, dict) else ():
        for item in value if isinstance(value, list) else ():
            if isinstance(item, dict):
                yield item


def _has_null_keys(raw: Any) -> bool:
    """Whether messages have null where the others have a value, as Arrow writes them."""
    messages = list(_messages(raw))
    return any(
        message.get(key, key) is None and any(other.get(key) is not None for other in messages)
        for message in messages
        for key in _MESSAGE_KEYS
    )


def _written(raw: Any) -> list[Any]:
    """The arguments of all calls as the row wrote them."""
    found = []
    for message in _messages(raw):
        calls = message.get("tool_calls")
        if isinstance(calls, str):
            found.append(calls)
        single = message.get("function_call")
        for call in [*(calls if isinstance(calls, list) else ()), single]:
            inner = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(inner, dict) and inner.get("arguments") is not None:
                found.append(inner["arguments"])
    return found
