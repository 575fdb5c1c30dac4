"""The canonical row: what every converter builds, and the keys that all formats share.

This file decides what becomes of ``system``, ``tools`` and ``functions``, ``chat_template_kwargs``,
a mark of the whole row, ``id``, ``metadata`` and media columns, and publishes the JSON Schema of
the canonical row. `turns` converts messages; `qcore.data.rows` checks the result.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from typing import Any, Final

from ...api.media import RowError
from ..sources.jsonl import parse
from ..tool_fields import kind
from .marks import flag
from .parts import media_names, place_media
from .reading import Reading
from .turns import decoded
from .unread import check_row, meaningless

SCHEMA_VERSION: Final = 1  #: of the canonical row; a new key that changes the input raises it
_SYSTEM = ("system", "system_prompt")
_SHARED = (
    *_SYSTEM, "tools", "functions", "parallel_tool_calls", "chat_template_kwargs", "train",
    "weight", "id", "metadata",
)  # fmt: skip


def schema() -> dict[str, Any]:
    """JSON Schema of the canonical row, of version `SCHEMA_VERSION`."""
    text = files(__package__).joinpath("canonical.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def finished(
    row: Mapping[str, Any], turns: Sequence[dict[str, Any]], reading: Reading, read: Collection[str]
) -> dict[str, Any]:
    """The canonical row of converted messages and the row's other keys.

    Args:
        row: the foreign row.
        turns: its canonical messages.
        reading: the row's state.
        read: keys that the format has read itself.

    Raises:
        RowError: ``QC-DATA-004``, ``-007``, ``-009``, ``-022``, ``-024``, ``-025``.
    """
    messages = list(turns)
    if row.keys() == {"messages"}:
        return {"messages": messages}
    media = media_names(reading.kinds)
    messages = _with_system(row, messages)
    if row.keys() & media:
        messages = place_media(messages, row, "", reading)
    done: dict[str, Any] = {"messages": messages}
    if (tools := _tools(row)) is not None:
        done["tools"] = tools
    _check_parallel(row, messages)
    if (trained := _mark(row)) is not None:
        done["train"] = trained
    if (variables := _variables(row)) is not None:
        done["chat_template_kwargs"] = variables
    shared = set(_SHARED)
    for key, kinds in (("id", (str, int)), ("metadata", (dict,))):
        value = row.get(key)
        if isinstance(value, kinds) and not isinstance(value, bool) and not meaningless(value):
            done[key] = value
        else:
            shared.discard(key)
    if not isinstance(row.get("train"), bool | int):
        shared.discard("train")  # the name of a split
    if not isinstance(row.get("weight"), int | float):
        shared.discard("weight")
    check_row(row, {*shared, *media, *read}, reading, turns)
    return done


def _with_system(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, led by the row's system prompt."""
    keys = [key for key in _SYSTEM if not meaningless(row.get(key))]
    if not keys:
        return messages
    values = [_system_text(row[key], key) for key in keys]
    first = messages[0].get("content") if messages and messages[0]["role"] == "system" else None
    if any(text != (first or values[0]) for text in values):
        raise RowError(
            "QC-DATA-024",
            "differs from another system prompt of the row",
            at=keys[0],
            expected="one system prompt",
            fix="write both as one system message at the start of messages",
        )
    return messages if first else [{"role": "system", "content": values[0]}, *messages]


def _system_text(value: Any, at: str) -> str:
    """A system prompt as text; Anthropic writes it as a list of blocks, too."""
    if isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in value
    ):
        return "\n".join(part["text"] for part in value)
    if isinstance(value, str):
        return value
    raise RowError(
        "QC-DATA-006", "has the wrong type", at=at, found=kind(value), expected="a string"
    )


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    """Function descriptions in OpenAI's nested form."""
    keys = [key for key in ("tools", "functions") if not meaningless(row.get(key))]
    read = {key: _tool_list(row[key], key) for key in keys}
    if len(read) == 2 and read["tools"] != read["functions"]:
        raise RowError(
            "QC-DATA-024",
            "differs from tools",
            at="functions",
            expected="one of tools and functions",
            fix="write all of them as tools",
        )
    return (read[keys[0]] or None) if keys else None


def _tool_list(value: Any, at: str) -> list[Any]:
    if isinstance(value, dict):
        value = [value]
    elif isinstance(value, str) and not value.strip():
        return []
    elif isinstance(value, str):
        value = parse(value, at=at)
        value = [value] if isinstance(value, dict) else value
    if meaningless(value):
        return []
    items = decoded(value, at, "tools")
    return [_tool(item, f"{at}[{index}]") for index, item in enumerate(items)]


def _tool(item: Any, at: str) -> Any:
    """One description; `qcore.data.rows` refuses a value that is none."""
    if isinstance(item, str):
        item = parse(item, at=at)
    if not isinstance(item, dict):
        return item
    tool = {key: value for key, value in item.items() if key != "cache_control"}
    named = tool.get("type")
    function = tool.get("function", tool)
    if not isinstance(function, dict) or "name" not in function:
        return tool
    if function is tool:
        if not isinstance(named, str) or named in ("function", "custom"):
            tool.pop("type", None)
        elif "parameters" not in tool and "input_schema" not in tool:
            raise RowError(
                "QC-DATA-026",
                "is a tool that another vendor's server runs",
                at=at,
                found=repr(named)[:80],
                expected="a function with its parameters",
                fix="describe it as a function: name, description, parameters",
            )
        tool = {"type": "function", "function": function}
    if "input_schema" in function:
        function = {
            "parameters" if key == "input_schema" else key: inner for key, inner in function.items()
        }
    if isinstance(function.get("parameters"), str) and function["parameters"]:
        parameters = parse(function["parameters"], at=f"{at}.parameters")
        function = {**function, "parameters": parameters}
    return {**tool, "function": function}


def _check_parallel(row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
    """``parallel_tool_calls`` means nothing, unless the row contradicts it."""
    if row.get("parallel_tool_calls") is not False:
        return
    for index, message in enumerate(messages):
        if len(message.get("tool_calls", ())) > 1:
            raise RowError(
                "QC-DATA-024",
                "is false, but a turn has several calls",
                at="parallel_tool_calls",
                found=f"{len(message['tool_calls'])} calls in message {index}",
                expected="true, or one call a turn",
            )


def _mark(row: Mapping[str, Any]) -> bool | None:
    """The mark of the whole row; a weight of 1 says nothing."""
    weight = row.get("weight")
    train = row.get("train")
    marks = []
    if isinstance(weight, int | float) and not isinstance(weight, bool) and weight != 1:
        marks.append(flag(weight, "weight"))
    if isinstance(train, bool | int):
        marks.append(flag(train, "train"))
    return min(marks) if marks else None


def _variables(row: Mapping[str, Any]) -> dict[str, Any] | None:
    value = row.get("chat_template_kwargs")
    if isinstance(value, str) and value:
        value = parse(value, at="chat_template_kwargs")
    if meaningless(value):
        return None
    if not isinstance(value, dict):
        raise RowError(
            "QC-DATA-006",
            "has the wrong type",
            at="chat_template_kwargs",
            found=kind(value),
            expected="an object",
        )
    return {key: item for key, item in value.items() if item is not None}
