"""Tool calls and tool descriptions of a chat row, and the errors for wrong fields.

This file decides which values these fields may have and their normal form. `qcore.data.content`
checks content, `qcore.data.rows` the row as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..api.media import RowError
from ..errors import nearest
from .sources.jsonl import parse


def calls(value: Any, at: str, parse_arguments: bool) -> list[dict[str, Any]]:
    """Normalize tool calls, nested as in OpenAI's format or flat.

    Raises:
        RowError: ``QC-DATA-007``, or ``-004`` for arguments that are not JSON.
    """
    if not isinstance(value, list):
        raise wrong(value, at, "a list of calls", code="QC-DATA-007")
    return [_call(item, f"{at}[{index}]", parse_arguments) for index, item in enumerate(value)]


def _call(item: Any, at: str, parse_arguments: bool) -> dict[str, Any]:
    code = "QC-DATA-007"
    call = without_nulls(mapping(item, at, code, "is not a call"))
    nested = "function" in call
    if nested:
        known_keys(call, ("id", "type", "function", "index"), at, code)
        at = f"{at}.function"
        function = without_nulls(mapping(call["function"], at, code, "is not a function"))
        known_keys(function, ("name", "arguments"), at, code)
    else:
        function = call
        known_keys(function, ("id", "type", "name", "arguments"), at, code)
    if not _name(function.get("name")):
        raise RowError(
            code,
            "has no function name",
            at=at,
            expected='{"type": "function", "function": {"name": ..., "arguments": {...}}}',
        )
    given = function.get("arguments")
    function = {**function, "arguments": _arguments(given, f"{at}.arguments", parse_arguments)}
    return {**call, "function": function} if nested else function


def _arguments(value: Any, at: str, parse_arguments: bool) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        return {} if parse_arguments else "{}"
    parsed = parse(value, at=at) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise RowError(
            "QC-DATA-007",
            "are not a JSON object",
            at=at,
            found=kind(parsed),
            expected='{"name": value} or the same as a JSON string',
            fix="write the arguments by their names",
        )
    return parsed if parse_arguments else value


def tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Normalize function descriptions.

    Raises:
        RowError: ``QC-DATA-007``.
    """
    code = "QC-DATA-007"
    wanted = '{"type": "function", "function": {"name": ...}}'
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RowError(code, "is not a list", at="tools", found=kind(value), expected=f"[{wanted}]")
    done = []
    for index, item in enumerate(value):
        at = f"tools[{index}]"
        tool: dict[str, Any] = _drop_nulls(mapping(item, at, code, "is not an object"))
        described = tool.get("function", tool)
        if not isinstance(described, dict) or not _name(described.get("name")):
            raise RowError(
                code, "has no function name", at=at, expected=wanted,
                fix="write tools as a list with such an object for each function",
            )  # fmt: skip
        done.append(tool)
    return tuple(done)


def without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the keys that are null."""
    return {key: item for key, item in given.items() if item is not None}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _drop_nulls(item)
            for key, item in value.items()
            if item is not None or key in ("default", "const")
        }
    if isinstance(value, list):
        return [_drop_nulls(item) for item in value]
    return value


def mapping(value: Any, at: str, code: str, what: str) -> dict[str, Any]:
    """Return `value` if it is an object."""
    if isinstance(value, dict):
        return value
    raise RowError(code, what, at=at, found=kind(value), expected="an object")


def known_keys(
    given: Mapping[str, Any],
    known: Sequence[str],
    at: str,
    code: str,
    advice: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse unknown keys, with a suggestion."""
    for key in given:
        if key in known:
            continue
        meant = nearest(key.lower(), known)
        raise RowError(
            code,
            "unknown key",
            at=f"{at}.{key}" if at else key,
            expected=", ".join(known),
            fix=advice.get(key)
            or (f'did you mean "{meant}"?' if meant else "move it to metadata of the row"),
        )


def _name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def wrong(
    value: Any, at: str, expected: str, code: str = "QC-DATA-006", fix: str | None = None
) -> RowError:
    """The error for a value of the wrong type."""
    return RowError(
        code, "has the wrong type", at=at, found=kind(value), expected=expected, fix=fix
    )


_KINDS: tuple[tuple[type | tuple[type, ...], Callable[[Any], str]], ...] = (
    (bool, lambda value: "true" if value else "false"),
    (str, lambda value: f"the string {value[:40]!r}"),
    ((int, float), lambda value: f"the number {str(value)[:40]}"),
    (list, lambda _: "a list"),
    (dict, lambda _: "an object"),
)


def kind(value: Any) -> str:
    """The type of a JSON value in words."""
    return next((say(value) for kinds, say in _KINDS if isinstance(value, kinds)), "null")
