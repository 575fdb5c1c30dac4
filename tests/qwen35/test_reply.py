"""Parsing of replies: the messages that were rendered, and everything else kept as text."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.chat_rows import Writer, canonical
from support.template_branches import unreached
from support.template_kit import JSON, PYTHON, family_template

from qcore.api import ChatFormat
from qcore_qwen35.chat import QWEN35
from qcore_qwen35.reply import ReplyParser, parse_reply
from qcore_qwen35.reply_values import typed, types_of
from qcore_qwen36.chat import QWEN36

REAL = {
    "qwen3.5/Qwen3.5-4B": QWEN35,
    "qwen3.5/Qwen3.5-0.8B": QWEN35,
    "qwen3.5/Qwen3.5-35B-A3B": QWEN35,
    "qwen3.6/Qwen3.6-27B": QWEN36,
}
END = "<|im_end|>"


def same(one: Any, other: Any) -> bool:
    """Equal values of equal types: 1 is not True, 1 is not 1.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


Render = Callable[..., str]


def check_row(row: dict[str, Any], render: Render, chat_format: ChatFormat) -> int:
    """Compare each assistant turn, as it is served, with what is parsed of it."""
    assert chat_format.parse is not None
    messages, tools = row["messages"], row.get("tools")
    turns = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        wanted = canonical(message)
        thinking = "reasoning_content" in wanted
        prompt = render(
            messages[:index],
            tools,
            add_generation_prompt=True,
            **{chat_format.thinking_switch: thinking},
        )
        full = render(messages[: index + 1], tools)
        assert full.startswith(prompt)
        found = chat_format.parse(full[len(prompt) :], tools, thinking=thinking)
        assert same(found, wanted), (found, wanted, full[len(prompt) :])
        turns += 1
    return turns


def stock(path: Path) -> Render:
    """Transformers' renderer of a template."""
    from transformers.utils.chat_template_utils import render_jinja_template

    text = path.read_text(encoding="utf-8")

    def render(messages: Any, tools: Any = None, **more: Any) -> str:
        rendered, _ = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=text, **more
        )
        return str(rendered[0])

    return render


def sweep(shared: Path, sku: str, count: int, seed: int) -> None:
    render = stock(shared / "skus" / sku / "chat_template.jinja")
    writer = Writer(seed, media=True)
    turns = sum(check_row(writer.row(), render, REAL[sku]) for _ in range(count))
    assert turns > count


@pytest.mark.parametrize("sku", REAL)
def test_a_rendered_message_is_parsed(shared: Path, sku: str) -> None:
    sweep(shared, sku, 60, seed=1)


@pytest.mark.parametrize("sku", REAL)
def test_the_rows_reach_every_branch_of_a_template(shared: Path, sku: str) -> None:
    """What is left are the refusals of the template, and checks that jinja2 writes itself."""
    text = (shared / "skus" / sku / "chat_template.jinja").read_text(encoding="utf-8")
    writer = Writer(1, media=True)
    prompts: list[dict[str, Any]] = [{"enable_thinking": on} for on in (True, False)]
    variants = [
        {"preserve_thinking": True, "add_vision_id": True},
        *({"add_generation_prompt": True, **more} for more in ({}, *prompts)),
    ]
    calls = [
        {"messages": row["messages"], "tools": row.get("tools"), **more}
        for row in (writer.row() for _ in range(100))
        for more in variants
    ]
    left = [line for line in unreached(text, calls) if "raise_exception" not in line]
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("sku", REAL)
def test_five_hundred_rendered_conversations_are_parsed(shared: Path, sku: str) -> None:
    sweep(shared, sku, 500, seed=2)


@pytest.mark.parametrize(("arguments", "chat_format"), [(PYTHON, QWEN35), (JSON, QWEN36)])
def test_a_rendered_message_is_parsed_without_real_files(
    arguments: str, chat_format: ChatFormat
) -> None:
    writer = Writer(3)
    with family_template(arguments) as template:
        for _ in range(30):
            check_row(writer.row(), template.render, chat_format)


@pytest.mark.parametrize("sku", REAL)
def test_every_turn_of_a_rendered_row_is_parsed(shared: Path, sku: str) -> None:
    """Also earlier turns, whose reasoning the template leaves out."""
    from qcore.data.rendering.masking import spans

    render = stock(shared / "skus" / sku / "chat_template.jinja")
    chat_format, writer = REAL[sku], Writer(4)
    assert chat_format.parse is not None
    for _ in range(20):
        row = writer.row()
        said = [canonical(m) for m in row["messages"] if m["role"] == "assistant"]
        text = render(row["messages"], row.get("tools"))
        for (start, end), wanted in zip(spans(text, chat_format, len(said)), said, strict=True):
            thinking = text[:start].endswith("<think>\n")
            found = chat_format.parse(text[start:end], row.get("tools"), thinking=thinking)
            if not thinking:
                wanted.pop("reasoning_content", None)
            assert same(found, wanted)


# What stays as it is.


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def xml(name: str, **values: str) -> str:
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in values.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "thinking", "wanted"),
    [
        ("", False, reply("")),
        ("Hi" + END, False, reply("Hi")),
        ("Hi<|endoftext|>", False, reply("Hi")),
        ("Hi", False, reply("Hi")),
        (f"Hi{END}\n", False, reply("Hi")),
        (f"Hi{END} there", False, reply(f"Hi{END} there")),
        ("  Hi\n", False, reply("  Hi\n")),
        ("R\n</think>\n\nA" + END, True, reply("A", reasoning_content="R")),
        ("\n</think>\n\nA" + END, True, reply("A")),
        ("R</think>A", True, reply("A", reasoning_content="R")),
        ("\n R\n\n</think>\n\n\n A", True, reply("\n A", reasoning_content="\n R\n")),
        ("R" + END, True, reply("", reasoning_content="R")),
        ("R </think> b </think>", True, reply(" b </think>", reasoning_content="R ")),
        ("<think>\nR\n</think>\n\nA", False, reply("A", reasoning_content="R")),
        ("<think>\nR", False, reply("<think>\nR")),
        ("A</think>B", False, reply("A</think>B")),
        ("A <think>R</think>", False, reply("A <think>R</think>")),
    ],
)
def test_reasoning_and_content(text: str, thinking: bool, wanted: dict[str, Any]) -> None:
    assert parse_reply(text, thinking=thinking) == wanted


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (xml("f"), "", [call("f")]),
        (xml("f", a="1"), "", [call("f", a="1")]),
        ("\n\n" + xml("f", a="1") + "\n", "", [call("f", a="1")]),
        ("Wait.\n\n" + xml("f"), "Wait.", [call("f")]),
        ("Wait." + xml("f"), "Wait.", [call("f")]),
        (xml("f") + "\n" + xml("g", b=""), "", [call("f"), call("g", b="")]),
        (xml("f") + "\nDone.", "\nDone.", [call("f")]),
        ("A\n\n" + xml("f") + " and " + xml("g"), "A and ", [call("f"), call("g")]),
        (xml("f", a="\n x\n"), "", [call("f", a="\n x\n")]),
        ("<tool_call><function=f><parameter=a>x</parameter></function></tool_call>", "",
         [call("f", a="x")]),
        ("<tool_call>\n<function=f>\n<parameter=a>\n</parameter>\n</function>\n</tool_call>", "",
         [call("f", a="")]),
        (xml("f", a="b</parameter>c"), "", [call("f", a="b</parameter>c")]),
        (xml("f", a="x\n<tool_call>\n<function=g>"), "",
         [call("f", a="x\n<tool_call>\n<function=g>")]),
        (xml("f", a="</parameter> </function> </tool_call>"), "",
         [call("f", a="</parameter> </function> </tool_call>")]),
        (xml("f", a="x").replace("\nx\n", "\n"), "", [call("f", a="")]),
        # Not a call.
        ("<tool_call>", "<tool_call>", None),
        ("<tool_call>\n{}\n</tool_call>", "<tool_call>\n{}\n</tool_call>", None),
        ("<tool_call>\n<function=f>\n", "<tool_call>\n<function=f>\n", None),
        ("A\n\n" + xml("f", a="1")[:-3], "A\n\n" + xml("f", a="1")[:-3], None),
        (xml("f", a="1").replace("</parameter>", ""),
         xml("f", a="1").replace("</parameter>", ""), None),
        (xml("f", a="1").replace("<parameter", "x<parameter"),
         xml("f", a="1").replace("<parameter", "x<parameter"), None),
        (xml("f\ng"), xml("f\ng"), None),
        (xml(""), xml(""), None),
        # Broken beside whole.
        ("<tool_call>\n" + xml("f"), "<tool_call>", [call("f")]),
        (xml("f") + "\n<tool_call>\n<function=g>", "\n<tool_call>\n<function=g>", [call("f")]),
    ],
)  # fmt: skip
def test_calls(text: str, content: str, calls: list[dict[str, Any]] | None) -> None:
    wanted = reply(content) if calls is None else reply(content, tool_calls=calls)
    assert parse_reply(text + END) == wanted


def test_a_repeated_parameter_stays_text() -> None:
    twice = xml("f", a="1").replace("</function>", "<parameter=a>\n2\n</parameter>\n</function>")
    assert parse_reply(twice) == reply(twice)
    assert parse_reply(twice + "\n" + xml("g", b="3")) == reply(
        twice.removesuffix("\n"), tool_calls=[call("g", b="3")]
    )


@pytest.mark.parametrize("seed", range(3))
def test_no_text_is_lost(seed: int) -> None:
    """Random markup: every letter of the text is in the message, as often as before."""
    rng = random.Random(seed)
    tags = (
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "f>", "</function>",
        "<parameter=", "p>", "q>", "</parameter>", "\n", "Ä", "Ö", "Ü", END,
    )  # fmt: skip
    for _ in range(2000):
        text = "".join(rng.choice(tags) for _ in range(rng.randrange(25)))
        for thinking in (False, True):
            found = parse_reply(text, thinking=thinking)
            kept = json.dumps(found, ensure_ascii=False)
            for letter in "ÄÖÜ":
                assert kept.count(letter) == text.count(letter), (text, found)


HOSTILE = {
    "opened calls": "<tool_call>\n<function=f>\n<parameter=p>\n",
    "calls in values": "<tool_call><function=f><parameter=p>x</parameter>",
    "names": "<tool_call><function=",
    "parameters": "<parameter=",
    "ends": "</parameter>\n",
    "think": "<think></think>",
    "white space": "<tool_call>" + " " * 50,
    "repeated": "<tool_call><function=f><parameter=p>1</parameter><parameter=p>2</parameter>",
    "two parts": "",
}


def hostile(name: str, size: int) -> str:
    if name == "two parts":  # many starts in one value, then many parameters and no end
        parameters = "".join(f"<parameter=k{n}>v</parameter>" for n in range(size // 30))
        return "<tool_call><function=f><parameter=p>" * (size // 36) + "</parameter>" + parameters
    return HOSTILE[name] * (size // len(HOSTILE[name]))


@pytest.mark.timing
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_linear_time(name: str) -> None:
    """Four times the text takes about four times as long."""
    took = []
    for size in (100_000, 400_000):
        text = hostile(name, size)
        before = time.process_time()
        parse_reply(text, thinking=False)
        took.append(time.process_time() - before)
    assert took[1] < 12 * took[0] + 0.25, took


# Values.


@pytest.mark.parametrize(
    ("text", "schema", "wanted"),
    [
        ("5", {"type": "integer"}, 5),
        (" 5\n", {"type": "integer"}, 5),
        ("5.5", {"type": "integer"}, "5.5"),
        ("5.0", {"type": "integer"}, 5.0),
        ("5.5", {"type": "number"}, 5.5),
        ("1e999", {"type": "number"}, "1e999"),
        ("NaN", {"type": "number"}, "NaN"),
        ("\u0665", {"type": "integer"}, "\u0665"),
        ("05", {"type": "integer"}, "05"),
        ("9" * 5000, {"type": "integer"}, "9" * 5000),
        ("true", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, True),
        ("TRUE", {"type": "boolean"}, "TRUE"),
        ("1", {"type": "boolean"}, "1"),
        ("None", {"type": ["integer", "null"]}, None),
        ("null", {"type": ["integer", "null"]}, None),
        ("1", {"type": "string"}, "1"),
        ("1", {}, "1"),
        ("1", None, "1"),
        ("1", True, "1"),
        ("1", {"type": "unheard of"}, "1"),
        ('{"a": 1}', {"type": "object"}, {"a": 1}),
        ('{"a": 1}', {"type": "array"}, '{"a": 1}'),
        ('{"a": 1, "a": 2}', {"type": "object"}, '{"a": 1, "a": 2}'),
        ('{"a": NaN}', {"type": "object"}, '{"a": NaN}'),
        ('["\\ud800"]', {"type": "array"}, '["\\ud800"]'),
        ("{'a': 1}", {"type": "object"}, "{'a': 1}"),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
        ("5", {"$ref": "#/$defs/a"}, 5),
        ("5", {"$ref": "#/$defs/loop"}, "5"),
        ("5", {"$ref": "https://example.com/a"}, "5"),
        ("5", {"anyOf": [{"type": "integer"}, {}]}, "5"),
        ("5", {"enum": ["5", 5]}, 5),
        ("4", {"type": "integer", "enum": [5]}, 4),
    ],
)  # fmt: skip
@pytest.mark.parametrize("python", [True, False])
def test_values(text: str, schema: Any, wanted: Any, python: bool) -> None:
    root = {"$defs": {"a": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    assert same(typed(text, schema, root, python), wanted)


def test_words_of_the_generation_where_a_string_is_possible_too() -> None:
    schema = {"type": ["string", "null", "boolean"]}
    for text, python, other in (
        ("None", None, "None"), ("null", "null", None), ("True", True, "True"),
        ("true", "true", True),
    ):  # fmt: skip
        assert same(typed(text, schema, None, True), python)
        assert same(typed(text, schema, None, False), other)


def test_types_of_odd_schemas() -> None:
    assert types_of({"type": 5}) is None
    assert types_of({"anyOf": "text"}) is None
    assert types_of({"anyOf": [{"type": "string"}], "nullable": True}) == {"string", "null"}
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(100):
        deep = {"anyOf": [deep]}
    assert types_of(deep) is None


def test_one_name_with_two_types() -> None:
    tools = [
        {"name": "f", "parameters": {"properties": {"level": {"type": "integer"}}}},
        {"function": {"name": "g", "parameters": {"properties": {"level": {"type": "string"}}}}},
    ]
    text = xml("f", level="1") + "\n" + xml("g", level="1")
    assert parse_reply(text, tools)["tool_calls"] == [call("f", level=1), call("g", level="1")]


@pytest.mark.parametrize("tools", [[5], [{"function": 5}], [{}], [{"name": "f"}],
                                   [{"name": "f", "parameters": {"properties": 5}}]])  # fmt: skip
def test_odd_tools(tools: Any) -> None:
    assert parse_reply(xml("f", a="1"), tools)["tool_calls"] == [call("f", a="1")]


# What cannot be recovered: another message has the same rendering.


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (reply("x"), reply(" x\n")),
        (reply("x", reasoning_content="r"), reply("x", reasoning_content="\nr ")),
        (reply("x", reasoning_content="r"), reply("<think>\nr\n</think>\n\nx")),
        (reply("", tool_calls=[call("f")]), reply(xml("f"))),
        (reply("", tool_calls=[call("f", a="1")]), reply("", tool_calls=[call("f", a=1)])),
        (
            reply("", tool_calls=[call("f", a="1", b="2")]),
            reply("", tool_calls=[call("f", a="1\n</parameter>\n<parameter=b>\n2")]),
        ),
    ],
)
def test_two_messages_with_one_rendering(one: dict[str, Any], other: dict[str, Any]) -> None:
    with family_template() as template:
        asked = {"role": "user", "content": "q"}
        text = template.render([asked, one])
        assert text == template.render([asked, other])
        prompt = template.render(
            [asked], add_generation_prompt=True, enable_thinking="reasoning_content" in one
        )
        found = QWEN35.parse(  # type: ignore[misc]
            text.removeprefix(prompt), thinking="reasoning_content" in one
        )
    assert found == one


def test_the_formats_parse() -> None:
    assert QWEN35.parse == ReplyParser(python_scalars=True)
    assert QWEN36.parse == ReplyParser(python_scalars=False)
    assert QWEN35.thinking_switch == QWEN36.thinking_switch == "enable_thinking"
