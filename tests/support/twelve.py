"""Twelve conversations that a chat template of the Qwen family can get wrong.

Their renderings, with what is trained of them marked, stand in tests/qwen36/conversations.txt.
"""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def bot(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def result(text: str) -> Row:
    return {"role": "tool", "content": text}


def call(name: str, arguments: Any) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: str) -> Row:
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema}
    function = {"name": name, "description": f"To {name}", "parameters": parameters}
    return {"type": "function", "function": function}


LAMP = tool("lamp", room="string", on="boolean", dim="number", scene="string")
FIND = tool("find", query="string", filters="object", tags="array")
CLOCK = tool("clock")

#: Title -> row.
ROWS: dict[str, Row] = {
    "one answer, no reasoning": {
        "messages": [user("Where is Oslo?"), bot("In Norway.")],
    },
    "one answer, with reasoning": {
        "messages": [
            user("What is 3 + 4?"),
            bot("7", reasoning_content="Three and four make seven."),
        ],
    },
    "a system turn and two answers, no reasoning": {
        "messages": [
            system("  Be brief.\n"),
            user("A fruit?"),
            bot("Apple."),
            user("Another?"),
            bot("  Pear. \n"),
        ],
    },
    "reasoning in every answer": {
        "messages": [
            user("A prime?"),
            bot("2", reasoning_content="Two is prime."),
            user("The next?"),
            bot("3", reasoning_content="\nTwo is taken.\nThree is prime.\n"),
        ],
    },
    "reasoning written into the content": {
        "messages": [
            user("Hot or cold?"),
            bot("<think>\nIce was named.\n</think>\n\nCold."),
            user("Sure?"),
            bot("<think>Still ice.</think>Yes."),
        ],
    },
    "a tool call with booleans, a null, numbers": {
        "tools": [LAMP],
        "messages": [
            user("Kitchen light off."),
            bot(
                "",
                reasoning_content="One call.",
                tool_calls=[
                    call(
                        "lamp",
                        {"room": "kitchen", "on": False, "dim": 0.5, "scene": None, "tries": 2},
                    )
                ],
            ),
            result('{"ok": true}'),
            bot("It is off.", reasoning_content="It worked."),
        ],
    },
    "a tool call with nested arguments": {
        "tools": [FIND],
        "messages": [
            user("Find red shoes."),
            bot(
                "I look.",
                tool_calls=[
                    call(
                        "find",
                        {
                            "query": 'shoes, "red" & <new>',
                            "filters": {"sale": True, "max": None, "size": {"eu": [42, 43.5]}},
                            "tags": ["a", True, None],
                        },
                    )
                ],
            ),
            result("none"),
            bot("There are none."),
        ],
    },
    "two calls at once, two results in a row": {
        "tools": [LAMP, CLOCK],
        "messages": [
            user("Light on; and the time?"),
            bot(
                "Both.",
                reasoning_content="Two calls.",
                tool_calls=[call("lamp", {"on": True}), call("clock", {})],
            ),
            result("done"),
            result("12:05"),
            bot("It is on, at 12:05.", reasoning_content="Both came back."),
        ],
    },
    "tool rounds before the last question": {
        "tools": [CLOCK],
        "messages": [
            user("The time?"),
            bot("", reasoning_content="Ask the clock.", tool_calls=[call("clock", {})]),
            result("12:05"),
            bot("12:05.", reasoning_content="It says so."),
            user("Thanks."),
            bot("You are welcome.", reasoning_content="Polite."),
        ],
    },
    "calls in two rounds, arguments as a JSON string": {
        "tools": [LAMP],
        "messages": [
            system("Use the tools."),
            user("Bedroom on, then off."),
            bot("", tool_calls=[call("lamp", '{"room": "bed", "on": true, "scene": null}')]),
            result("on"),
            bot("", tool_calls=[call("lamp", '{"room": "bed", "on": false}')]),
            result("off"),
            bot("Done."),
        ],
    },
    "an answer that ends in a call": {
        "tools": [CLOCK],
        "messages": [user("The time?"), bot("", tool_calls=[call("clock", {})])],
    },
    "other scripts, parts, white space inside": {
        "messages": [
            user([{"type": "text", "text": "हिन्दी और "}, {"type": "text", "text": "مُحَمَّد"}]),
            bot("नमस्ते 👋", reasoning_content="यह हिन्दी है।"),
            user("Cafe\u0301?"),
            bot("Café:\n\n\tun  café 咖啡", reasoning_content="C'est du français."),
        ],
    },
}


def as_served(row: Row) -> Row:
    """The row as transformers' ``apply_chat_template`` wants it: arguments are no strings."""
    messages = []
    for message in row["messages"]:
        calls = [
            call(given["function"]["name"], _parsed(given["function"]["arguments"]))
            for given in message.get("tool_calls", ())
        ]
        messages.append({**message, **({"tool_calls": calls} if calls else {})})
    return {"messages": messages, "tools": row.get("tools")}


def _parsed(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments
