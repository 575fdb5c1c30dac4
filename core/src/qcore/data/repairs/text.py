"""Markup that a row writes as text: tool calls, tool results, think blocks, marks of media.

This file decides what is converted. A call as JSON in an assistant's text (Hermes) under a
template that writes calls in another way contradicts the prompt of its own row, and no server
would read it as a call: it becomes a call if `tools` declares its function, else the row is
refused. Text after a call is refused, because a template writes calls last; so are a call in the
reasoning, and one beside `tool_calls` that is not among them. A mention of the tags is left alone.

Codes: ``QC-DATA-050`` a think block moved to ``reasoning_content``, ``-054`` calls and results as
text, ``-055`` a mark of a medium
as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from ...api.media import RowError
from ..formats.unread import MEDIA, MEDIA_COLUMNS
from ..sources.jsonl import parse as parse_json
from ..think_block import split_block
from .notes import Notes, PlacedMessage, RepairContext, function_of, functions_of, text_only

MOVED, AS_TEXT, NO_MEDIUM = "QC-DATA-050", "QC-DATA-054", "QC-DATA-055"
_SPACE = re.compile(r"\s*")
_JSON = "JSON"  #: form of calls in text


@cache
def _result_patterns(tags: tuple[str, str]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A text that is nothing but results, and one of them."""
    opens, closes = map(re.escape, tags)
    whole = rf"\s*(?:{opens}(?:(?!{opens}|{closes}).)*{closes}\s*)+"
    return re.compile(whole, re.DOTALL), re.compile(rf"{opens}\n?(.*?)\n?{closes}", re.DOTALL)


def read_text_calls(
    turns: list[PlacedMessage], tools: Any, context: RepairContext, notes: Notes
) -> list[PlacedMessage]:
    """Convert calls and results that are written as text.

    Raises:
        RowError: ``QC-DATA-054`` a call that cannot be converted.
    """
    made: list[PlacedMessage] = []
    for turn in turns:
        before = made[-1] if made else None
        calling = before is not None and (before.role == "tool" or bool(before.calls))
        if turn.role == context.assistant:
            _check_reasoning(turn, context)
            one = _with_calls if not turn.calls else _without_repeated
            made.append(one(turn, tools, context, notes))
        elif turn.role == "tool" or (turn.role == "user" and calling):
            made += _results(turn, context, notes)
        else:
            made.append(turn)
    return made


def _calls_in_text(
    turn: PlacedMessage, tools: Any, context: RepairContext
) -> tuple[str, list[dict[str, Any]], str]:
    """The text before the calls in the text of a turn, the calls, and their form; else no calls."""
    text = text_only(turn.message.get("content"))
    tags = context.call_tags
    if not text or tags is None or tags[0] not in text or context.abilities.calls != "other":
        return text or "", [], ""
    head, calls = _json_calls(text, tags, turn.at)
    if calls:
        return head, calls, _JSON
    head, calls = _parsed_calls(text, tools, context, turn.at)
    return head, calls, "the template's markup"


def _with_calls(
    turn: PlacedMessage, tools: Any, context: RepairContext, notes: Notes
) -> PlacedMessage:
    """An assistant turn whose text holds calls, with `tool_calls`."""
    head, calls, form = _calls_in_text(turn, tools, context)
    if form == _JSON and (
        missing := [name for name in _names(calls) if name not in functions_of(tools)]
    ):
        raise RowError(
            AS_TEXT,
            "is a tool call as JSON text, in a format that the chat template does not write, of a "
            "function that tools does not declare",
            at=f"{turn.at}.content",
            found=", ".join(missing)[:80],
            expected="tool_calls, or a call of a function in tools",
            fix="declare the function in tools; the text is then converted to tool_calls",
        )
    if not calls:
        return turn
    notes.note(
        AS_TEXT,
        f"{turn.at}.content",
        f"{len(calls)} tool call{'s' if len(calls) > 1 else ''} in {form} converted to tool_calls",
    )
    return turn.but(content=head, tool_calls=calls)


def _without_repeated(
    turn: PlacedMessage, tools: Any, context: RepairContext, notes: Notes
) -> PlacedMessage:
    """An assistant turn with `tool_calls` without the same calls in its text."""
    head, calls, _ = _calls_in_text(turn, tools, context)
    if not calls:
        return turn
    if [_plain(call) for call in calls] != [_plain(call) for call in turn.calls]:
        raise RowError(
            AS_TEXT,
            "has a tool call as text beside tool_calls",
            at=f"{turn.at}.content",
            found=", ".join(_names(calls))[:80],
            expected="all calls in tool_calls",
            fix="write the call into tool_calls, and take its text out of content",
        )
    notes.note(AS_TEXT, f"{turn.at}.content", "calls as text that tool_calls repeats: text dropped")
    return turn.but(content=head)


def _plain(call: Any) -> tuple[Any, Any]:
    """Name and arguments of a call."""
    function = function_of(call) or {}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(RowError):
            arguments = parse_json(arguments)
    return function.get("name"), arguments or {}


def _check_reasoning(turn: PlacedMessage, context: RepairContext) -> None:
    """Refuse a call in the reasoning, where no server reads it as a call."""
    text, tags = turn.message.get("reasoning_content"), context.call_tags
    if not isinstance(text, str) or tags is None or context.abilities.calls != "other":
        return
    for found in _call_start(tags).finditer(text):
        try:
            _json_call(text, found.end() - 1, tags, turn.at)
        except RowError:  # a mention of the tag
            continue
        raise RowError(
            AS_TEXT,
            "has a tool call in the reasoning, where no server reads it as a call",
            at=f"{turn.at}.reasoning_content",
            found=repr(text[found.start() : found.start() + 60]),
            expected="calls in tool_calls",
            fix="write the call into tool_calls",
        )


def _names(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    return [call["function"]["name"] for call in calls]


@cache
def _call_start(tags: tuple[str, str]) -> re.Pattern[str]:
    """The opening tag of a call as JSON."""
    return re.compile(re.escape(tags[0]) + r"\s*\{")


def _json_calls(text: str, tags: tuple[str, str], at: str) -> tuple[str, list[dict[str, Any]]]:
    """The text before the first call as JSON, and the calls."""
    first = _call_start(tags).search(text)
    if first is None:
        return text, []
    calls = []
    place = first.start()
    while place < len(text):
        if not text.startswith(tags[0], place):
            _refuse_after(text[place:], at)
        call, place = _json_call(text, _after_space(text, place + len(tags[0])), tags, at)
        calls.append(call)
        place = _after_space(text, place)
    return text[: first.start()].rstrip(), calls


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found is not None else place


def _json_call(text: str, start: int, tags: tuple[str, str], at: str) -> tuple[dict[str, Any], int]:
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
        value = parse_json(text[start:end], at=at)
        close = _after_space(text, end)
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json(arguments, at=at)
        if (
            text.startswith(tags[1], close)
            and isinstance(value.get("name"), str)
            and not value.keys() - {"name", "arguments", "id"}
            and isinstance(arguments, dict)
        ):
            function = {"name": value["name"], "arguments": arguments}
            own = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
            return {**own, "type": "function", "function": function}, close + len(tags[1])
    except (ValueError, RecursionError, AttributeError, RowError):
        pass
    raise RowError(
        AS_TEXT,
        "is a tool call as text that cannot be read",
        at=f"{at}.content",
        found=repr(text[start : start + 60]),
        expected=f'{tags[0]}{{"name": ..., "arguments": {{...}}}}{tags[1]}',
        fix="write the call as tool_calls",
    )


def _parsed_calls(
    text: str, tools: Any, context: RepairContext, at: str
) -> tuple[str, list[dict[str, Any]]]:
    """The text before the first call in the template's own markup, and the calls."""
    if context.parse is None or context.call_tags is None:
        return text, []
    shown = tools if isinstance(tools, list | tuple) else ()
    parsed = context.parse(text, [tool for tool in shown if isinstance(tool, dict)])
    calls = parsed.get("tool_calls") or []
    if not calls or "reasoning_content" in parsed:
        return text, []
    head = parsed["content"]
    if not (text.startswith(head) and text[len(head) :].lstrip().startswith(context.call_tags[0])):
        _refuse_after(head, at)
    return head, calls


def _refuse_after(text: str, at: str) -> None:
    raise RowError(
        AS_TEXT,
        "has text after a tool call, which the chat template cannot write",
        at=f"{at}.content",
        found=repr(text.strip()[:60]),
        expected="text, then calls, then the end of the turn",
        fix="write the text before the calls, or into the turn after their results",
    )


def _results(turn: PlacedMessage, context: RepairContext, notes: Notes) -> list[PlacedMessage]:
    """Tool turns of a turn that writes the tags of results itself."""
    text = text_only(turn.message.get("content"))
    if text is None or context.result_tags is None or not context.abilities.wraps_results:
        return [turn]
    whole, one = _result_patterns(context.result_tags)
    if not whole.fullmatch(text):
        return [turn]
    what = "turn" if turn.role == "user" else "turn with tags of its own"
    notes.note(AS_TEXT, turn.at, f"{turn.role} {what} converted to tool results")
    return [turn.but(role="tool", content=result) for result in one.findall(text)]


def move_thinking(
    turns: list[PlacedMessage], context: RepairContext, notes: Notes
) -> list[PlacedMessage]:
    """Move think blocks into ``reasoning_content``, where the template does not do it itself."""
    able, marks = context.abilities, context.marks
    if marks is None or able.splits_content or not able.reads_reasoning:
        return turns
    made = []
    for turn in turns:
        text = text_only(turn.message.get("content"))
        split = split_block(text, marks) if text is not None else None
        if turn.role != context.assistant or split is None or "reasoning_content" in turn.message:
            made.append(turn)
            continue
        notes.note(MOVED, f"{turn.at}.content", "think block moved to reasoning_content")
        made.append(turn.but(reasoning_content=split[0], content=split[1]))
    return made


@cache
def _marks_of(kinds: tuple[str, ...]) -> re.Pattern[str]:
    """Marks of media; in backticks, a mark is a word."""
    return re.compile(r"`[^`\n]*`|<(" + "|".join(map(re.escape, kinds)) + ")>")


def check_marks(turns: Sequence[PlacedMessage], kinds: tuple[str, ...], raw: Any = None) -> None:
    """Refuse marks of media: the model would be trained on the word.

    In a user turn every mark of an installed kind is refused. Other marks may be about markup: in
    any turn they are refused if the row has a column or a part of media, and in a user turn also
    at the start or end of the text, where no sentence has them.

    Args:
        turns: the row's turns.
        kinds: kinds of media that rows may have.
        raw: the row before it was converted, whose columns may be media.

    Raises:
        RowError: ``QC-DATA-055``.
    """
    pattern = _marks_of(tuple(dict.fromkeys((*kinds, *MEDIA))))
    media = _has_media(turns, raw)
    for turn in turns:
        content = turn.message.get("content")
        parts = content if isinstance(content, list) else [content]
        types = [part.get("type") for part in parts if isinstance(part, dict)]
        for part in parts:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str) or "<" not in text:
                continue
            for kind in pattern.findall(text):
                if not kind or f"</{kind}>" in text:
                    continue
                mark, user = f"<{kind}>", turn.role == "user"
                edge = text.strip().startswith(mark) or text.strip().endswith(mark)
                if media or (user and (edge or kind in kinds)):
                    raise _no_medium(turn, kind, kind in kinds, kind in types)


def _has_media(turns: Sequence[PlacedMessage], raw: Any) -> bool:
    """Whether a row has a column or a part of media."""
    columns = raw if isinstance(raw, dict) else {}
    return any(columns.get(key) for key in MEDIA_COLUMNS & columns.keys()) or any(
        isinstance(part, dict) and part.get("type") in MEDIA
        for turn in turns
        for content in [turn.message.get("content")]
        for part in (content if isinstance(content, list) else ())
    )


def _no_medium(turn: PlacedMessage, kind: str, readable: bool, beside: bool) -> RowError:
    example = f'{{"type": "{kind}", "{kind}": <path>}}'
    if not readable:
        advice = f"install a plugin that reads {kind} parts, or take rows without them"
    elif beside:
        advice = f"take the mark out of the text: the {kind} part stands for it"
    else:
        advice = (
            f"write the part {example} in its place, or list the files under {kind}s "
            "beside messages"
        )
    return RowError(
        NO_MEDIUM,
        f"contains the mark <{kind}> as text",
        at=f"{turn.at}.content",
        expected=f"parts of type {kind} without marks",
        fix=f"{advice}; write `<{kind}>` in backticks if the word itself is meant",
    )
