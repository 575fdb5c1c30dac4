"""Formats whose rows hold one prompt and one answer: TRL's pairs, Alpaca, ms-swift's keys.

This file decides which column is the prompt and which the answer. A row with two candidates is
refused, because either of them would be lost.

Codes: ``QC-DATA-024`` two prompts or two answers, ``-005`` a value of another type,
``-051`` an answer that continues a turn of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...api.media import RowError
from ..sources.jsonl import parse
from ..tool_fields import kind
from .canonical import finished
from .reading import REASONING, Reading
from .turns import numbered, read_turns
from .unread import meaningless

#: Keys of a prompt and of an answer, as ms-swift maps them.
QUERIES = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSES = (
    "response", "completion", "answer", "output", "targets", "target", "answer_key", "answers",
    "solution", "content",
)  # fmt: skip


def is_trl(row: Mapping[str, Any]) -> bool:
    """Whether the row has ``prompt`` and ``completion``."""
    return not meaningless(row.get("prompt")) and not meaningless(row.get("completion"))


def is_alpaca(row: Mapping[str, Any]) -> bool:
    """Whether the row has ``instruction`` and ``output``."""
    return isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)


def is_ms_swift(row: Mapping[str, Any]) -> bool:
    """Whether the row has a prompt and an answer under any of ms-swift's keys."""
    return any(not meaningless(row.get(key)) for key in QUERIES) and any(
        not meaningless(row.get(key)) for key in RESPONSES
    )


def trl(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Convert ``prompt`` and ``completion``; only the completion is trained."""
    return _pair(row, "prompt", "completion", (), reading)


def alpaca(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Convert ``instruction``, ``input``, ``output``, ``system`` and ``history``."""
    return _pair(row, "instruction", "output", ("input",), reading)


def ms_swift(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Convert a prompt and an answer under any of ms-swift's keys, with ``history``."""
    mapped = reading.fields.columns
    asked = [key for key in QUERIES if not meaningless(row.get(key))]
    more: tuple[str, ...] = ()
    if "input" in asked and len(asked) > 1 and ("input" in mapped or "instruction" in asked):
        asked.remove("input")
        more = ("input",)
    query = _one(asked, "query", "prompt", "a prompt", reading)
    answers = [key for key in RESPONSES if not meaningless(row.get(key))]
    response = _one(answers, "response", "completion", "an answer", reading)
    return _pair(row, query, response, more, reading)


def _one(keys: list[str], ours: str, trl_key: str, what: str, reading: Reading) -> str:
    """The key that is read; one that the user has mapped comes first."""
    if not keys:
        raise RowError("QC-DATA-023", f"has no column with {what}", expected=f"{ours} or {trl_key}")
    mapped = [key for key in keys if key in reading.fields.columns]
    if len(mapped or keys) == 1:
        return (mapped or keys)[0]
    kept, *others = mapped or keys
    raise RowError(
        "QC-DATA-024",
        f"is not the only column with {what}",
        at=kept,
        found=" and ".join(mapped or keys),
        expected="one of them",
        fix=f"name it in a mix file: fields: {{{ours}: {kept}}}, ignore_columns: {others}".replace(
            "'", ""
        ),
    )


def _pair(
    row: dict[str, Any], query: str, response: str, more: tuple[str, ...], reading: Reading
) -> dict[str, Any]:
    answer = row.get(response)
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str):
        answer = answer[0]
    prompt = _prompt(row, query, more, reading)
    calls = _calls(answer, response) if not meaningless(row.get("tools")) else None
    said = calls or _side(answer, response, "assistant", reading)
    thoughts = [key for key in REASONING if not meaningless(row.get(key))]
    if thoughts:
        said = _with_reasoning(said, [(key, row[key]) for key in thoughts])
    if prompt and prompt[-1]["role"] == said[0]["role"] == "assistant":
        raise RowError(
            "QC-DATA-051",
            "ends with an assistant turn, which the answer would continue",
            at=query,
            expected="a prompt that ends with a user or tool turn",
            fix=f"move the start of the answer from {query} to {response}",
        )
    turns = [*_history(row.get("history"), reading), *prompt, *said]
    read = (query, response, *more, "history", *thoughts)
    _check_second(row, read, reading)
    return finished(row, turns, reading, read)


def _prompt(
    row: Mapping[str, Any], query: str, more: tuple[str, ...], reading: Reading
) -> list[dict[str, Any]]:
    """The turns before the answer, none of them trained."""
    value = row.get(query)
    for key in more:
        if meaningless(row.get(key)):
            continue
        if not isinstance(row[key], str) or not isinstance(value, str):
            raise _not_text(row[key], key)
        value = f"{value}\n{row[key]}" if value else row[key]
    return [
        {**turn, "train": False} if turn["role"] == "assistant" else turn
        for turn in _side(value, query, "user", reading)
    ]


def _side(value: Any, at: str, role: str, reading: Reading) -> list[dict[str, Any]]:
    """A prompt or an answer: text of one turn, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        if any("type" in item and not {"role", "from"} & item.keys() for item in value):
            return read_turns([(at, {"role": role, "content": value})], reading)
        return read_turns(numbered(value, at), reading)
    raise _not_text(value, at)


def _calls(value: Any, at: str) -> list[dict[str, Any]] | None:
    """The turn of an answer that is a JSON list of calls, as in xLAM's data; else ``None``."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = parse(value, at=at)
        except RowError:
            return None
    items = value if isinstance(value, list) else [value]
    if not items or not all(
        isinstance(item, dict) and {"name"} < item.keys() <= {"name", "arguments", "parameters"}
        for item in items
    ):
        return None
    return read_turns([(at, {"role": "tool_call", "content": items})], Reading())


def _history(value: Any, reading: Reading) -> list[dict[str, Any]]:
    """Earlier turns: pairs of prompt and answer, or messages."""
    if isinstance(value, str) and value:
        value = parse(value, at="history")
    if meaningless(value):
        return []
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return read_turns(numbered(value, "history"), reading)
    turns = []
    for index, pair in enumerate(value if isinstance(value, list) else [value]):
        at = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(
                "QC-DATA-005", "is not a pair of prompt and answer", at=at, found=kind(pair)
            )
        for role, text in zip(("user", "assistant"), pair):
            if text is not None:
                turns += _side(text, at, role, reading)
    return turns


def _with_reasoning(
    turns: list[dict[str, Any]], thoughts: list[tuple[str, Any]]
) -> list[dict[str, Any]]:
    """The answer with the reasoning that stands in a column of its own."""
    last = turns[-1]
    at = thoughts[0][0]
    if len(thoughts) > 1 or last["role"] != "assistant" or "reasoning_content" in last:
        raise RowError(
            "QC-DATA-024",
            "is a second reasoning, or one without an answer",
            at=at,
            found=", ".join(key for key, _ in thoughts),
            expected="one reasoning of the answer",
        )
    if not isinstance(thoughts[0][1], str):
        raise _not_text(thoughts[0][1], at)
    return [*turns[:-1], {**last, "reasoning_content": thoughts[0][1]}]


def _check_second(row: Mapping[str, Any], read: tuple[str, ...], reading: Reading) -> None:
    """Refuse a second prompt or answer that the user has not decided about."""
    for family, ours, what in ((QUERIES, "query", "prompt"), (RESPONSES, "response", "answer")):
        if any(key in reading.fields.columns for key in family):
            continue
        used = next((key for key in family if key in read), None)
        for key in family:
            if key in read or meaningless(row.get(key)) or key == "content":
                continue
            raise RowError(
                "QC-DATA-024",
                f"may be a second {what}",
                at=key,
                found=f"{used} and {key}",
                expected="one of them",
                fix=f"name it in a mix file: fields: {{{ours}: {used}}}, ignore_columns: [{key}]",
            )


def _not_text(value: Any, at: str) -> RowError:
    return RowError(
        "QC-DATA-005",
        "is neither text nor a list of messages",
        at=at,
        found=kind(value),
        expected="a string, or messages with role and content",
        fix="write a row for each of the texts" if isinstance(value, list) else "write it as text",
    )
