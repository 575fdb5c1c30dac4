"""Formats whose rows hold a list of messages: OpenAI's chat, ShareGPT, Anthropic's blocks.

This file decides which list a row is read from and what stands beside it. `turns` converts the
messages themselves. A ``prompt`` or an answer beside a whole conversation that repeats a part of
it (as in UltraChat) is left out; another one is refused, and so is an answer beside a conversation
that lacks it, because the text would be lost.

Codes: ``QC-DATA-024`` two conversations, or an answer beside one that lacks it, ``-026`` a block
of Anthropic's API that messages cannot hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from ...api.media import RowError
from .. import tool_fields
from .canonical import finished
from .parts import reference
from .reading import Reading
from .turns import ROLES, decoded, numbered, read_turns
from .unread import check_message, meaningless, repeated

_LISTS = ("messages", "conversations", "conversation")
#: Strings that repeat a part of the conversation beside them.
_ECHOES = ("prompt", "instruction", "input", "query", "question", "problem")
_ANSWERS = ("completion", "response", "output", "answer", "solution")
_BLOCKS = ("tool_use", "tool_result", "thinking", "redacted_thinking")


def is_anthropic(row: Mapping[str, Any]) -> bool:
    """Whether a message holds a block that only Anthropic's API has."""
    messages = row.get("messages")
    return isinstance(messages, list) and any(
        isinstance(part, dict) and (part.get("type") in _BLOCKS or "source" in part)
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def is_sharegpt(row: Mapping[str, Any]) -> bool:
    """Whether the row has ``conversations``, or messages with ``from`` and ``value``."""
    for key in _LISTS:
        value = row.get(key)
        if meaningless(value):
            continue
        first = value[0] if isinstance(value, list) else None
        return key != "messages" or (isinstance(first, dict) and "from" in first)
    return False


def is_openai(row: Mapping[str, Any]) -> bool:
    """Whether the row has ``messages``."""
    return not meaningless(row.get("messages"))


def openai(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Convert OpenAI's messages, those of its fine-tuning API, TRL's and ms-swift's."""
    return _conversation(row, "messages", reading)


def sharegpt(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Convert ``conversations`` of ``from`` and ``value``."""
    key = next((key for key in (*_LISTS[1:], "messages") if not meaningless(row.get(key))), "")
    return _conversation(row, key or "conversations", reading)


def anthropic(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Convert messages of content blocks."""
    items = decoded(row.get("messages"), "messages")
    split = [
        one for at, item in numbered(items, "messages") for one in _unblocked(item, at, reading)
    ]
    return _finished(row, "messages", read_turns(split, reading), reading)


def _conversation(row: dict[str, Any], key: str, reading: Reading) -> dict[str, Any]:
    items = numbered(decoded(row.get(key), key), key)
    names = {*reading.fields.message, "role", "from"}
    if isinstance(items[0][1], dict) and not names & items[0][1].keys():
        roles = {*ROLES, *reading.fields.roles}
        items = [one for at, item in items for one in _by_role(item, at, roles)]
    return _finished(row, key, read_turns(items, reading), reading)


def _finished(
    row: dict[str, Any], key: str, turns: list[dict[str, Any]], reading: Reading
) -> dict[str, Any]:
    if row.keys() == {key}:
        return {"messages": turns}
    for other in _LISTS:
        if other != key and not meaningless(row.get(other)):
            raise RowError(
                "QC-DATA-024",
                "is a second conversation",
                at=other,
                found=f"{key} and {other}",
                expected="one of them",
                fix=f"ignore_columns: [{other}] in a mix file reads {key}",
            )
    answered = turns[-1]["role"] == "assistant"
    for other in (*_ECHOES, *_ANSWERS):
        if other not in row:
            continue
        value = row[other]
        repeats = turns if other in _ECHOES else turns[-1:] if answered else []
        if meaningless(value) or (isinstance(value, str) and repeated(value, repeats)):
            continue
        if isinstance(value, str) and other in _ECHOES:
            makes = "fields: {system: instruction} in a mix file makes it the system prompt"
            raise RowError(
                "QC-DATA-024",
                f"stands beside {key}, whose turns do not repeat it",
                at=other,
                expected=f"the whole conversation in {key}",
                fix=makes
                if other == "instruction"
                else f"write it into {key} as a turn; if it is metadata, "
                f"ignore_columns: [{other}] in a mix file",
            )
        if isinstance(value, str) or _holds_messages(value):
            raise RowError(
                "QC-DATA-024",
                f"stands beside {key}" + ("" if answered else ", which end without an answer"),
                at=other,
                expected=f"the whole conversation in {key}",
                fix=f"ignore_columns: [{other}] in a mix file reads {key} alone"
                if answered
                else f"fields: {{prompt: {key}, completion: {other}}} in a mix file reads both",
            )
    return finished(row, turns, reading, (key,))


def _holds_messages(value: Any) -> bool:
    return isinstance(value, list) and isinstance(value[0], dict)


def _by_role(item: Any, at: str, roles: Set[str]) -> Iterator[tuple[str, Any]]:
    """The turns of an item such as ``{"human": ..., "assistant": ...}``."""
    given = tool_fields.mapping(item, at, "QC-DATA-006", "is not a message")
    named = [key for key in given if {key, key.lower()} & roles and not meaningless(given[key])]
    if not named:
        yield at, item
        return
    rest = {key: value for key, value in given.items() if key not in named}
    for key in named:
        yield f"{at}.{key}", {"role": key, "content": given[key], **rest}


# Anthropic's blocks.


def _unblocked(item: Any, at: str, reading: Reading) -> Iterator[tuple[str, Any]]:
    """A message of blocks as messages of OpenAI's form."""
    if not isinstance(item, dict) or not isinstance(item.get("content"), list):
        yield at, item
        return
    blocks = numbered(item["content"], f"{at}.content")
    rest = {key: value for key, value in item.items() if key != "content"}
    if str(item.get("role")).lower() == "assistant":
        yield at, {**rest, **_assistant(blocks, reading)}
        return
    said: list[Any] = []
    for here, block in blocks:
        if isinstance(block, dict) and block.get("type") == "tool_result":
            if said:
                yield at, {**rest, "content": said}
                said = []
            yield here, _result(block, here, reading)
        else:
            said.append(_media_block(block, here))
    if said:
        yield at, {**rest, "content": _plain(said)}


def _result(block: Mapping[str, Any], at: str, reading: Reading) -> dict[str, Any]:
    check_message(block, ("type", "tool_use_id", "content"), at, reading)
    content = block.get("content")
    if isinstance(content, list):
        content = _plain(
            [_media_block(part, f"{at}.content[{n}]") for n, part in enumerate(content)]
        )
    result = {"role": "tool", "content": "" if meaningless(content) else content}
    return {**result, "tool_call_id": block.get("tool_use_id")}


def _assistant(blocks: list[tuple[str, Any]], reading: Reading) -> dict[str, Any]:
    """Reasoning, content and calls of an assistant's blocks, which must stand in this order."""
    thoughts: list[str] = []
    said: list[Any] = []
    calls: list[dict[str, Any]] = []
    for at, block in blocks:
        named = block.get("type") if isinstance(block, dict) else None
        if named == "redacted_thinking":
            raise RowError(
                "QC-DATA-026",
                "is encrypted reasoning, which only its vendor can read",
                at=at,
                expected="text, thinking or tool_use",
                fix="take rows whose thinking is readable; without it the turn would be "
                "trained as one without reasoning",
            )
        if (named == "thinking" and (said or calls)) or (named != "tool_use" and calls):
            raise RowError(
                "QC-DATA-026",
                f"is a {named} block after {'tool_use' if calls else 'text'}",
                at=at,
                expected="thinking, then text, then tool_use: a message holds them in this order",
                fix="split the turn into messages, or put the block in its place",
            )
        if named == "thinking":
            thoughts.append(_thought(block, at))
        elif named == "tool_use":
            check_message(block, ("type", "id", "name", "input"), at, reading)
            function = {"name": block.get("name"), "arguments": block.get("input")}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        else:
            said.append(_media_block(block, at))
    return {"content": _plain(said), "reasoning_content": "\n".join(thoughts), "tool_calls": calls}


def _thought(block: Mapping[str, Any], at: str) -> str:
    text = block.get("thinking")
    if isinstance(text, str):
        return text
    raise tool_fields.wrong(text, f"{at}.thinking", "a string")


def _media_block(block: Any, at: str) -> Any:
    """A block whose bytes stand under ``source``, with their data URL in its place."""
    if not isinstance(block, dict) or not isinstance(block.get("source"), dict):
        return block
    named = str(block.get("type"))
    return {**block, "source": reference(block["source"], named, f"{at}.source")}


def _plain(parts: list[Any]) -> Any:
    """The text of a content that is one text block; the blocks of another."""
    if not parts:
        return ""
    only = parts[0]
    single = len(parts) == 1 and isinstance(only, dict) and only.get("type") == "text"
    return only.get("text") if single and not {"train", "weight"} & only.keys() else parts
