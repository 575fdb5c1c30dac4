"""Messages of foreign rows as canonical turns: roles, content, tool calls, training marks.

This file decides what an item of a conversation means, in any of the spellings that the formats
share: ``role``/``content`` or ``from``/``value``, role names of other tools, OpenAI's
``function_call`` and ``refusal``, calls that are items of their own, tool results that are
objects, marks of what is trained (``train``, ``training``, ``weight``, ``loss``, ``loss_scale``,
``train_detail``). `parts` converts parts of a content; the order of turns and the types of
values are checked by `qcore.data.rows`.

Codes: ``QC-DATA-006`` an item that is not a message, an unknown role, ``-016`` two reasonings,
``-022`` a mark that cannot be kept, ``-024`` a key that contradicts the turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ...api.media import RowError
from ...errors import nearest
from .. import tool_fields
from ..sources.jsonl import parse
from ..tool_fields import kind
from .marks import DETAILS, MARKS, mark_of, mark_of_parts
from .parts import media_names, place_media, read_parts
from .reading import CALL, REASONING, Reading
from .unread import check_message, meaningless, repeated

#: Role as written, in lower case with ``_`` for ``-`` and blanks -> canonical role.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "ai", "bing", "bard"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(
        ("tool", "observation", "observations", "tool_response", "tool_result", "function",
         "function_response", "function_result", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}  # fmt: skip
_PLAIN = frozenset(("system", "user", "assistant", "tool"))
#: Keys of an assistant turn beside its content.
_SAID = frozenset((*REASONING, "tool_calls", "function_call", "refusal"))
_READ = _SAID | {
    "role", "from", "content", "value", "tool_call_id", "name", *MARKS, *DETAILS,
}  # fmt: skip
#: Keys that may hold the text of a turn; the others than that which is read may be a second one.
_TEXTS = ("content", "value", "text", "answer", "response", "output", "completion")
_FUNCTION = ("name", "arguments")
_CALL = ("id", "type", "function", "index", *_FUNCTION)
#: In LLaMA-Factory's form of a call, ends the text before the JSON, whatever the model's tags are.
_THOUGHT_END = "</think>"


def read_turns(items: Iterable[tuple[str, Any]], reading: Reading) -> list[dict[str, Any]]:
    """The canonical messages of a conversation.

    Args:
        items: place in the row and value of each item.
        reading: the row's state.

    Raises:
        RowError: ``QC-DATA-004``, ``-006``, ``-007``, ``-022``, ``-024``.
    """
    custom = bool(reading.fields.message or reading.fields.roles)
    turns: list[dict[str, Any]] = []
    for at, item in items:
        if (
            not custom
            and type(item) is dict
            and len(item) == 2
            and type(item.get("role")) is str
            and item["role"] in _PLAIN
            and type(item.get("content")) is str
        ):
            turns.append(item)
            continue
        turn, is_call = _turn(item, at, reading)
        if is_call and turns and _continues(turns[-1], turn):
            if "tool_calls" not in turns[-1]:  # it may be the row's own object
                turns[-1] = {**turns[-1], "tool_calls": []}
            turns[-1]["tool_calls"] += turn["tool_calls"]
        else:
            turns.append(turn)
    return turns


def numbered(value: list[Any], at: str) -> list[tuple[str, Any]]:
    """The items of a list with their places in the row."""
    return [(f"{at}[{index}]", item) for index, item in enumerate(value)]


def decoded(value: Any, at: str, what: str = "messages") -> list[Any]:
    """A list that may be written as a JSON string.

    Raises:
        RowError: ``QC-DATA-004`` for a string that is not JSON, ``-005`` for another value.
    """
    if isinstance(value, str):
        value = parse(value, at=at)
    if isinstance(value, list) and value:
        return value
    raise RowError(
        "QC-DATA-005",
        f"is not a list of {what}",
        at=at,
        found="an empty list" if value == [] else kind(value),
        expected=f"a list of at least one of the {what}, or the same as a JSON string",
        fix=f"write the {what} as a list, in their order" if isinstance(value, dict) else None,
    )


def _continues(before: Mapping[str, Any], turn: Mapping[str, Any]) -> bool:
    """Whether a call that is an item of its own belongs to the assistant turn before it."""
    return before["role"] == "assistant" and before.get("train") == turn.get("train")


def _turn(item: Any, at: str, reading: Reading) -> tuple[dict[str, Any], bool]:
    if not isinstance(item, dict):
        raise RowError(
            "QC-DATA-006", "is not a message", at=at, found=kind(item), expected="an object",
            fix='write each message as {"role": ..., "content": ...}',
        )  # fmt: skip
    raw = item
    if renames := reading.fields.message:
        raw = {renames.get(key, key): value for key, value in raw.items()}
    given = {key: value for key, value in raw.items() if not meaningless(value)}
    media = media_names(reading.kinds)
    role = _role(raw, at, reading)
    if not given.keys() <= _READ:
        check_message(given, _READ | media, at, reading)
    key = "content" if "content" in raw else "value"
    if key not in raw and not given.keys() & _SAID:
        raise _no_content(given, at)
    content, is_call = raw.get(key), role == CALL
    _check_content(given, key, role, at, reading)
    trained = mark_of(given, content, role, at)
    if isinstance(content, list) and not is_call:
        trained, content = mark_of_parts(content, trained, role, f"{at}.{key}")
    turn: dict[str, Any] = {"role": "assistant" if is_call else role}
    if is_call:
        turn["content"], turn["tool_calls"] = _calls_of(content, f"{at}.{key}")
    else:
        _content(turn, content, f"{at}.{key}", reading)
    if turn["role"] == "assistant" and given.keys() & _SAID:
        _assistant(turn, given, at, reading)
    for name in ("tool_call_id", "name"):
        if name in given:
            turn[name] = given[name]
    if trained is not None:
        turn["train"] = trained
    if given.keys() & media:
        turn = place_media([turn], given, at, reading)[0]
    return turn, is_call


def _role(given: Mapping[str, Any], at: str, reading: Reading) -> str:
    key = "role" if "role" in given else "from"
    role = given.get(key)
    if not isinstance(role, str):
        raise RowError(
            "QC-DATA-006",
            "has no role",
            at=at,
            found=", ".join(given)[:80] or None,
            expected="role and content, or from and value",
            fix=_mapping_fix(given),
        )
    known = reading.fields.roles.get(role) or ROLES.get(role)
    known = known or ROLES.get(role.strip().lower().replace("-", "_").replace(" ", "_"))
    if known is not None:
        return known
    meant = nearest(role.lower(), ROLES)
    advice = f"fields: {{roles: {{assistant: {role}}}}} in a mix file says whose turn it is"
    raise RowError(
        "QC-DATA-006",
        "unknown role",
        at=f"{at}.{key}",
        found=repr(role)[:80],
        expected="system, user, assistant or tool",
        fix=f'write "{ROLES[meant]}"' if meant and ROLES[meant] != CALL else advice,
    )


def _no_content(given: Mapping[str, Any], at: str) -> RowError:
    texts = [key for key, text in given.items() if key not in _READ and isinstance(text, str)]
    return RowError(
        "QC-DATA-006",
        "has no content",
        at=at,
        found=", ".join(given)[:80],
        expected="content or value",
        fix=f"fields: {{content: {texts[0]}}} in a mix file" if texts else None,
    )


def _check_content(
    given: Mapping[str, Any], key: str, role: str, at: str, reading: Reading
) -> None:
    """Refuse a second text of a turn, and what only the assistant says in another's turn."""
    for other in _TEXTS:
        column = f"messages[].{other}"
        if other == key or not isinstance(given.get(other), str) or column in reading.ignore:
            continue
        if not repeated(given[other], [{"content": given.get(key)}]):
            raise RowError(
                "QC-DATA-024", f"may be a second {key}", at=f"{at}.{other}",
                found=f"{key} and {other}", expected="one of them",
                fix=f"write both as {key}, or, if it is metadata, ignore_columns: [{column}] in a "
                "mix file",
            )  # fmt: skip
    if role in ("assistant", CALL):
        return
    for said in sorted(given.keys() & _SAID):
        column = f"messages[].{said}"
        if column not in reading.ignore:
            raise RowError(
                "QC-DATA-024", f"is read in assistant turns alone, and this is a {role} turn",
                at=f"{at}.{said}",
                fix="write it into the assistant turn, or, if it is metadata, "
                f"ignore_columns: [{column}] in a mix file",
            )  # fmt: skip
        reading.ignored.append(column)


def _content(turn: dict[str, Any], content: Any, at: str, reading: Reading) -> None:
    """Set the content; an assistant turn may have none, others are left to the row's check."""
    if isinstance(content, dict) and "type" in content and turn["role"] != "tool":
        content = [content]
    if isinstance(content, list):
        results = turn["role"] == "tool" and not all(
            isinstance(part, dict) and isinstance(part.get("type"), str) for part in content
        )
        content = _json_text(content, at) if results else read_parts(content, at, reading)
    elif turn["role"] == "tool" and isinstance(content, dict | bool | int | float):
        content = _json_text(content, at)
    elif content is None and turn["role"] == "assistant":
        content = ""
    turn["content"] = content
    if content is None:
        del turn["content"]


def _json_text(value: Any, at: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError:  # bytes, which column formats have
        raise RowError(
            "QC-DATA-006", "holds bytes", at=at, expected="text, or values that JSON has"
        ) from None


def _assistant(turn: dict[str, Any], given: Mapping[str, Any], at: str, reading: Reading) -> None:
    """Add reasoning, calls and a refusal."""
    thoughts = {key: given[key] for key in REASONING if key in given}
    first = next(iter(thoughts.values()), None)
    if not all(text == first for text in thoughts.values()):
        raise RowError(
            "QC-DATA-016",
            "has two different reasonings",
            at=at,
            found=" and ".join(thoughts),
            expected="one of them",
            fix="write the reasoning of the turn as reasoning_content",
        )
    if thoughts:
        turn["reasoning_content"] = first
    calls = given.get("tool_calls")
    if isinstance(calls, str):
        calls = parse(calls, at=f"{at}.tool_calls")
    if not meaningless(calls):
        known = _known_calls(calls, f"{at}.tool_calls", reading)
        read = tool_fields.calls(known, f"{at}.tool_calls", True)
        turn["tool_calls"] = [*turn.get("tool_calls", ()), *map(_nested, read)]
    if "function_call" in given:
        call = given["function_call"]
        more = tool_fields.calls([call], f"{at}.function_call", True)
        if not meaningless(calls) and [_nested(one) for one in more] != turn["tool_calls"]:
            raise RowError(
                "QC-DATA-007",
                "differs from tool_calls",
                at=f"{at}.function_call",
                expected="one of function_call and tool_calls",
            )
        turn["tool_calls"] = [_nested(one) for one in more]
    if said := given.get("refusal"):
        if turn["content"] not in ("", said):
            raise RowError(
                "QC-DATA-024",
                "stands beside content",
                at=f"{at}.refusal",
                expected="content or refusal",
                fix="write the text that the assistant said as content",
            )
        turn["content"] = said


def _known_calls(calls: Any, at: str, reading: Reading) -> Any:
    """Calls without the metadata that clients write beside name and arguments."""
    if not isinstance(calls, list):
        return calls
    known = []
    for index, call in enumerate(calls):
        if isinstance(call, dict):
            check_message(call, _CALL, f"{at}[{index}]", reading)
            call = {key: value for key, value in call.items() if key in _CALL}
            function = call.get("function")
            if isinstance(function, dict):
                check_message(function, _FUNCTION, f"{at}[{index}].function", reading)
                call["function"] = {key: function[key] for key in function if key in _FUNCTION}
        known.append(call)
    return known


def _calls_of(value: Any, at: str) -> tuple[str, list[dict[str, Any]]]:
    """Text and calls of an item that is a call: an object, a list, or either as JSON."""
    text = ""
    if isinstance(value, str):
        head, mark, tail = value.rpartition(_THOUGHT_END)
        text, value = f"{head}{mark}", parse(tail.strip(), at=at)
    items = [
        {"arguments": item["parameters"], **{k: v for k, v in item.items() if k != "parameters"}}
        if isinstance(item, dict) and "parameters" in item and "arguments" not in item
        else item
        for item in (value if isinstance(value, list) else [value])
    ]
    calls = tool_fields.calls(items, at, True)
    if not calls:
        raise RowError("QC-DATA-007", "holds no call", at=at, expected='{"name", "arguments"}')
    return text, [_nested(call) for call in calls]


def _nested(call: Mapping[str, Any]) -> dict[str, Any]:
    """A checked call in OpenAI's nested form."""
    function = call.get("function", call)
    plain = {"name": function["name"], "arguments": function["arguments"]}
    nested: dict[str, Any] = {"type": "function", "function": plain}
    if not meaningless(call.get("id")):
        nested["id"] = call["id"]
    return nested


def _mapping_fix(given: Mapping[str, Any]) -> str:
    """The field mapping that reads a message with other keys; the role is the shorter text."""
    texts = sorted(
        (key for key in given if isinstance(given[key], str)), key=lambda k: len(given[k])
    )
    role, content = texts if len(texts) == 2 else ("<key>", "<key>")
    return f"fields: {{role: {role}, content: {content}}} in a mix file names the keys"
