"""Generated conversations that reach every branch of the family's chat templates.

The branches of a template, and what reaches them here:

===========================  ====================================================================
content                      text, a list of text parts, absent or null beside calls; with
                             `media`, pictures and videos in user turns
system                       absent, first, empty beside tools
tools                        absent, nested under ``function``, flat
user                         a question; a question of the form of a tool result
assistant before the last    with and without reasoning, with and without calls
question, and after it
reasoning                    absent, empty, in ``reasoning_content``, as a block in content
calls                        nested, flat; one, several; beside content, alone; without arguments
arguments                    text, number, boolean, null, list, object
tool results                 one, several in a row, last in the row
===========================  ====================================================================

Contents hold text that resembles markup. All values fit their schemas, and no text is a value of
another type that its schema allows too: what cannot be recovered is tested by itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

_WORDS = (
    "rain", "Oslo", "naïve", "हिन्दी", "مُحَمَّد", "你好", "👍🏽", "x < y", "a > b", "1", "null", "None",
    "true", "{", "}", "[1]", "</tool_call>", "<tool_call>", "<function=f>", "</function>",
    "<parameter=p>", "</parameter>", "<tool_response>", "`code`", '"quoted"', "\\n", "\t", "\\",
)  # fmt: skip
_PLAIN = ("rain", "Oslo", "naïve", "हिन्दी", "مُحَمَّد", "x < y", "</parameter>", "<tool_call>", "\\n")

#: Beginnings of a call, in the template's markup or as JSON, and ends of a value as a template
#: writes them.
_NOT_RECOVERED = re.compile(
    r"<tool_call>\s*(?=<function=|\{)|</parameter>\n(?=<parameter=[^>\n]*>|</function>\n)"
)

Rng = random.Random


def text(rng: Rng) -> str:
    """Text with white space at its ends and markup inside."""
    made = rng.choice(("", "", " ", "\n", "\n\n", "    "))
    for _ in range(rng.randrange(0, 5)):
        made += rng.choice(_WORDS) + rng.choice((" ", "\n", "\n\n", "", "\n    "))
    return _NOT_RECOVERED.sub("", made)


def trimmed(rng: Rng) -> str:
    """Text as a template leaves it: not empty, no white space at its ends."""
    made = text(rng).strip()
    return made or "yes"


def word(rng: Rng) -> str:
    """Text that reads as no other type."""
    return rng.choice(("", "\n", "- ")) + rng.choice(_PLAIN) + rng.choice(("", "\n", " !"))


def _number(rng: Rng) -> float:
    return rng.choice((0.5, -2.25, 1e-05, 1e20, 3.0, 12345678.9))


def _nested(rng: Rng) -> dict[str, Any]:
    return {rng.choice(_WORDS): [rng.randrange(9), None, True, text(rng)], "é": {"x": 1.5}}


#: Schema of a parameter and a generator of its values.
PARAMETERS: tuple[tuple[Any, Callable[[Rng], Any]], ...] = (
    ({"type": "string"}, text),
    ({"type": "string", "enum": ["1", "null", "celsius"]}, lambda rng: rng.choice(("1", "null"))),
    ({"type": "integer"}, lambda rng: rng.choice((0, -7, 10**25, rng.randrange(100)))),
    ({"type": "number"}, _number),
    ({"type": "boolean"}, lambda rng: rng.random() < 0.5),
    ({"type": "null"}, lambda rng: None),
    ({"type": "array", "items": {"type": "integer"}}, lambda rng: [rng.randrange(9), 2]),
    ({"type": "array"}, lambda rng: [_nested(rng), text(rng), None, True]),
    ({"type": "object"}, _nested),
    ({"properties": {"x": {}}}, _nested),
    ({"type": ["string", "null"]}, lambda rng: rng.choice((None, word(rng)))),
    ({"type": "string", "nullable": True}, lambda rng: rng.choice((None, word(rng)))),
    ({"type": ["string", "integer", "boolean"]},
     lambda rng: rng.choice((5, True, "05", "5.0", " 5", word(rng)))),
    ({"anyOf": [{"type": "number"}, {"type": "string"}]},
     lambda rng: rng.choice((1, 2.5, "1.50", word(rng)))),
    ({"oneOf": [{"type": "array"}, {"type": "null"}]}, lambda rng: rng.choice(([1, "a"], None))),
    ({"allOf": [{"description": "no type"}, {"type": "integer"}]}, lambda rng: rng.randrange(9)),
    ({"enum": [1, 2.5, None, True, "one"]}, lambda rng: rng.choice((1, 2.5, None, True, "one"))),
    ({"const": 3}, lambda rng: 3),
    ({"$ref": "#/$defs/level"}, lambda rng: rng.randrange(9)),
    ({"type": "int"}, lambda rng: rng.randrange(9)),
    ({"description": "any"}, text),
)  # fmt: skip


def tool(rng: Rng, name: str) -> tuple[dict[str, Any], Callable[[Rng], dict[str, Any]]]:
    """A function description and a generator of arguments for it."""
    chosen = [rng.choice(PARAMETERS) for _ in range(rng.randrange(0, 6))]
    names = rng.sample(("city", "level", "unit", "a b", "größe", "x<y", "p", "q"), len(chosen))
    given = dict(zip(names, chosen, strict=True))
    function = {
        "name": name,
        "description": "Finds <b>things</b>",
        "parameters": {
            "type": "object",
            "properties": {key: schema for key, (schema, _) in given.items()},
            "$defs": {"level": {"type": "integer"}},
        },
    }

    def arguments(rng: Rng) -> dict[str, Any]:
        return {key: value(rng) for key, (_, value) in given.items() if rng.random() < 0.8}

    return (function if rng.random() < 0.2 else {"type": "function", "function": function}), (
        arguments
    )


def _said(rng: Rng, said: str) -> str | list[dict[str, Any]]:
    if rng.random() < 0.8:
        return said
    cut = rng.randrange(len(said) + 1)
    return [{"type": "text", "text": said[:cut]}, {"type": "text", "text": said[cut:]}]


class Writer:
    """Writes one conversation after another; the same seed writes the same ones."""

    def __init__(self, seed: int = 0, *, media: bool = False) -> None:
        self.rng = random.Random(seed)
        self.media = media

    def row(self) -> dict[str, Any]:
        """``{"messages": [...]}``, with ``tools`` in some."""
        rng = self.rng
        made = [tool(rng, name) for name in ("find", "get_it", "f.g-h")[: rng.randrange(0, 4)]]
        names = [one.get("function", one)["name"] for one, _ in made]
        calls = dict(zip(names, (arguments for _, arguments in made), strict=True))
        messages: list[dict[str, Any]] = []
        if rng.random() < 0.4:
            said = "" if made and rng.random() < 0.2 else trimmed(rng)
            messages.append({"role": "system", "content": _said(rng, said)})
        for _ in range(rng.randrange(1, 4)):
            asked = trimmed(rng)
            if messages and rng.random() < 0.1:
                messages.append({"role": "user", "content": _said(rng, "First of all.")})
                messages.append(self._answer({}, False))
                asked = f"<tool_response>\n{asked}\n</tool_response>"
            messages.append({"role": "user", "content": self._with_media(_said(rng, asked))})
            messages += self._turns(calls)
        row: dict[str, Any] = {"messages": messages}
        if made:
            row["tools"] = [one for one, _ in made]
        return row

    def _with_media(self, said: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if not self.media or isinstance(said, str):
            return said
        named = self.rng.choice(("image", "video"))
        return [*said, {"type": named, named: named}]

    def _turns(self, calls: dict[str, Callable[[Rng], dict[str, Any]]]) -> list[dict[str, Any]]:
        rng, turns = self.rng, []
        for _ in range(rng.randrange(0, 3) if calls else 0):
            turns.append(self._answer(calls, True))
            for _ in turns[-1]["tool_calls"]:
                turns.append({"role": "tool", "content": _said(rng, trimmed(rng))})
        if not turns or rng.random() < 0.9:
            turns.append(self._answer(calls, False))
        return turns

    def _answer(
        self, calls: dict[str, Callable[[Rng], dict[str, Any]]], call: bool
    ) -> dict[str, Any]:
        rng = self.rng
        turn: dict[str, Any] = {"role": "assistant"}
        if not call or rng.random() < 0.4:
            turn["content"] = _said(rng, trimmed(rng))
        elif rng.random() < 0.6:
            turn["content"] = rng.choice(("", None))
        kind = rng.choice(("none", "none", "apart", "apart", "empty", "block"))
        if kind == "block" and isinstance(turn.get("content"), str) and turn["content"]:
            turn["content"] = f"<think>\n{trimmed(rng)}\n</think>\n\n{turn['content']}"
        elif kind in ("apart", "empty"):
            turn["reasoning_content"] = trimmed(rng) if kind == "apart" else ""
        if call:
            turn["tool_calls"] = []
            for name in rng.choices(sorted(calls), k=rng.randrange(1, 4)):
                function: dict[str, Any] = {"name": name, "arguments": calls[name](rng)}
                if not function["arguments"] and rng.random() < 0.5:
                    del function["arguments"]
                flat = rng.random() < 0.2
                turn["tool_calls"].append(
                    function if flat else {"type": "function", "function": function}
                )
        return turn


def canonical(message: dict[str, Any]) -> dict[str, Any]:
    """The message that a parser is to return for an assistant turn."""
    said = message.get("content") or ""
    if not isinstance(said, str):
        said = "".join(part["text"] for part in said)
    made: dict[str, Any] = {"role": "assistant", "content": said}
    if said.startswith("<think>") and "reasoning_content" not in message:
        head, made["content"] = said.split("\n</think>\n\n")
        made["reasoning_content"] = head.removeprefix("<think>\n")
    if message.get("reasoning_content"):
        made["reasoning_content"] = message["reasoning_content"]
    if message.get("tool_calls"):
        functions = [call.get("function", call) for call in message["tool_calls"]]
        made["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": one["name"], "arguments": one.get("arguments", {})},
            }
            for one in functions
        ]
    return made
