"""Parity: no difference where a row is trained as it is served, else one with its cause."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import FakeCheckpoint, own_tokenizer, write_rows
from support.chat_rows import Writer
from support.template_kit import family_template
from tokenizers import Tokenizer

from qcore.api import ChatFormat
from qcore.checkpoint.chat_template import Template
from qcore.checkpoint.tokenizer import load_tokenizer
from qcore.data.rejects import Rejects
from qcore.data.rendering.renderer import Options, Renderer
from qcore.data.rendering.samples import Sample
from qcore.data.sources.source import Source
from qcore.data.views.parity import Difference, parity
from qcore_qwen35.chat import QWEN35
from qcore_qwen36.chat import QWEN36

REAL = {
    "qwen3.5/Qwen3.5-4B": QWEN35,
    "qwen3.5/Qwen3.5-0.8B": QWEN35,
    "qwen3.5/Qwen3.5-35B-A3B": QWEN35,
    "qwen3.6/Qwen3.6-27B": QWEN36,
}


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with family_template() as opened:
        yield opened


@pytest.fixture(scope="session")
def real(shared: Path) -> Tokenizer:
    return load_tokenizer(FakeCheckpoint(shared / "skus" / "tokenizer", None))  # type: ignore[arg-type]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: Any = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def sample(text: str, *turns: int) -> Sample:
    return Sample(sample=1, text=text, spans=(), turns=turns)


def served(row: dict[str, Any], template: Template) -> list[Sample]:
    """A sample for each assistant turn, as it is when it is served."""
    messages, tools = row["messages"], row.get("tools")
    return [
        sample(template.render(messages[: index + 1], tools), index)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def compared(
    template: Template, *messages: dict[str, Any], tools: Any = None, **more: Any
) -> list[tuple[int, str, str, str]]:
    row = {"messages": list(messages), "tools": tools}
    found = parity(row["messages"], tools, served(row, template), QWEN35, template, **more)
    return [(one.turn, one.kind, one.field, one.cause) for one in found]


def sweep(
    template: Template, chat_format: ChatFormat, tokenizer: Tokenizer | None, count: int
) -> int:
    writer, turns = Writer(11), 0
    for _ in range(count):
        row = writer.row()
        samples = served(row, template)
        found = parity(
            row["messages"], row.get("tools"), samples, chat_format, template, tokenizer=tokenizer
        )
        assert found == (), (found, row)
        turns += len(samples)
    return turns


def test_turns_as_they_are_served(template: Template) -> None:
    assert sweep(template, QWEN35, None, 20) > 20


@pytest.mark.parametrize("sku", REAL)
def test_turns_as_real_templates_serve_them(shared: Path, sku: str, real: Tokenizer) -> None:
    path = shared / "skus" / sku / "chat_template.jinja"
    with Template(path.read_text(encoding="utf-8"), sku) as template:
        sweep(template, REAL[sku], real, 15)


@pytest.mark.slow
@pytest.mark.parametrize("sku", REAL)
def test_five_hundred_conversations_as_they_are_served(
    shared: Path, sku: str, real: Tokenizer
) -> None:
    path = shared / "skus" / sku / "chat_template.jinja"
    with Template(path.read_text(encoding="utf-8"), sku) as template:
        sweep(template, REAL[sku], real, 500)


@pytest.mark.parametrize("sku", REAL)
def test_samples_of_a_run_are_what_is_served(
    shared: Path, tmp_path: Path, sku: str, real: Tokenizer
) -> None:
    assert run(shared, tmp_path, sku, real, 15) > 15


@pytest.mark.slow
@pytest.mark.parametrize("sku", REAL)
def test_samples_of_five_hundred_rows_are_what_is_served(
    shared: Path, tmp_path: Path, sku: str, real: Tokenizer
) -> None:
    assert run(shared, tmp_path, sku, real, 500) > 500


def run(shared: Path, tmp_path: Path, sku: str, tokenizer: Tokenizer, count: int) -> int:
    """Read rows as a run does, with repairs and shared samples; the number of trained turns."""
    writer = Writer(12)
    path = write_rows(tmp_path / "rows.jsonl", [writer.row() for _ in range(count)])
    text = (shared / "skus" / sku / "chat_template.jinja").read_text(encoding="utf-8")
    rejects, turns = Rejects(), 0
    with Template(text, sku) as template, Template(text, sku) as other:
        renderer = Renderer(template, REAL[sku], tokenizer, Options(), rejects)
        for plan, encoded in renderer.encoded([Source(name="rows", files=(path,))]):
            found = parity(
                plan.row.messages, plan.row.tools, [one.sample for one in encoded], REAL[sku],
                other, tokenizer=tokenizer,
            )  # fmt: skip
            assert found == (), (found, plan.row)
            turns += sum(len(one.sample.turns) for one in encoded)
    rejects.stop(renderer.notes.counts)
    return turns


# Prompts.


def one(
    messages: list[dict[str, Any]], text: str, turn: int, template: Template, **more: Any
) -> Difference:
    (found,) = parity(messages, None, [sample(text, turn)], QWEN35, template, **more)
    return found


def test_history_that_serving_shows_otherwise(template: Template) -> None:
    """The rendering of the whole row leaves out the think block of the first answer."""
    messages = [user("a"), bot("b", reasoning_content="r"), user("c"), bot("d")]
    text = template.render(messages)
    found = parity(messages, None, [sample(text, 1, 3)], QWEN35, template)
    assert [(one.turn, one.kind) for one in found] == [(1, "prompt"), (1, "message")]
    assert found[0].cause == "serving prompts for this turn with thinking"
    assert found[1].cause == "the template leaves the reasoning out"


def test_history_that_training_shows_otherwise() -> None:
    with family_template(keep="true") as keeps, family_template() as strips:
        messages = [user("a"), bot("b"), user("c"), bot("d")]
        found = one(messages, keeps.render(messages), 3, strips)
    assert (found.kind, found.turn) == ("prompt", 3)
    assert found.cause == "the template renders message 1 otherwise in the history of this turn"


def test_the_other_mode_of_thinking(template: Template) -> None:
    messages = [user("a"), bot("b")]
    found = one(messages, template.render(messages), 1, template,
                variables={"enable_thinking": True})  # fmt: skip
    assert found.kind == "prompt"
    assert found.cause.startswith("serving prompts for this turn with")


def test_text_before_the_first_answer(template: Template) -> None:
    text = template.render([user("x"), bot("b")])
    assert one([user("a"), bot("b")], text, 1, template).cause == (
        "the template renders the text before the first answer otherwise"
    )


def test_a_prompt_that_the_template_refuses(template: Template) -> None:
    text = template.render([bot("b"), user("a")])
    found = one([bot("b"), user("a")], text, 0, template)
    assert found.cause.startswith("the template renders no prompt for it: No user turn.")
    assert found.finding(3).severity == "warning"


def test_a_turn_that_the_sample_lacks(template: Template) -> None:
    text = template.render([user("a"), bot("b")])
    messages = [user("a"), bot("b"), user("c"), bot("d")]
    assert one(messages, text, 3, template).cause == "the sample does not contain the turn"


# Tokens.


def test_a_token_of_prompt_and_reply() -> None:
    """A template without the newline of the header, so that the tokenizer merges two letters."""
    text = "{%- for m in messages -%}[{{ m.role }}]{{ m.content }}<|im_end|>{%- endfor -%}"
    text += "{%- if add_generation_prompt -%}[assistant]{%- endif -%}"
    chat_format = replace(
        QWEN35, turn_start="[", role_end="]", prompt_tails=(), parse=None, thinking_switch=""
    )
    tokenizer = own_tokenizer()
    with Template(text.replace("]", "] th"), "t") as template:
        chat_format = replace(chat_format, role_end="] th")
        messages = [user("a"), bot("e user")]
        whole = template.render(messages)
        found = parity(
            messages, None, [sample(whole, 1)], chat_format, template, tokenizer=tokenizer
        )
    assert [(one.kind, one.turn) for one in found] == [("tokens", 1)]
    assert "merges" in found[0].finding(1).message


def test_a_tokenizer_that_cuts_newlines_by_what_follows(template: Template) -> None:
    """GPT-2's pre-tokenizer, unlike Qwen's: two newlines before a word are two tokens."""
    found = compared(template, user("q"), bot("x"), tokenizer=own_tokenizer())
    assert [(turn, kind) for turn, kind, _, _ in found] == [(1, "tokens")]


# Messages.


@pytest.mark.parametrize(
    ("message", "field", "cause"),
    [
        (bot(" x\n"), "content", "the template trims whitespace"),
        (bot("    return 1\n\n"), "content", "the template trims whitespace"),
        (bot("x", reasoning_content="r\n"), "reasoning_content", "the template trims whitespace"),
        (bot("<tool_call>\n<function=f>\n</function>\n</tool_call>"), "content",
         "the text contains markup of calls"),
    ],
)  # fmt: skip
def test_text_that_is_trained_otherwise(
    template: Template, message: dict[str, Any], field: str, cause: str
) -> None:
    found = compared(template, user("q"), message)
    assert found[0] == (1, "message", field, cause)


def test_reasoning_with_markup(template: Template) -> None:
    found = compared(template, user("q"), bot("x", reasoning_content="a</think>b"))
    assert [where[2] for where in found] == ["reasoning_content", "content"]
    assert found[0][3] == "the text contains markup of reasoning"


@pytest.mark.parametrize(
    "message",
    [
        bot("<think>\nr\n</think>\n\nx"),
        bot([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        bot("x", reasoning_content=""),
        bot(None, tool_calls=[call("f")]),
        bot("x", tool_calls=[{"name": "f", "arguments": {"s": "a\n\nb"}}]),
        bot("</think> beside reasoning", reasoning_content="r"),
    ],
)
def test_messages_that_are_trained_as_they_are(template: Template, message: dict[str, Any]) -> None:
    assert compared(template, user("q"), message, tools=[tool("f", s={"type": "string"})]) == []


@pytest.mark.parametrize(
    ("value", "tools", "cause"),
    [
        (1, None, "tools does not declare the function, so that every value is a string"),
        (1, [tool("f")], "the function has no such property, so that the value is a string"),
        ("1", [tool("f", x={"type": "integer"})],
         "the value does not have the one type that the schema gives to its text"),
        (1, [tool("f", x={"type": "string"})],
         "the value does not have the one type that the schema gives to its text"),
        ("a\n</parameter>\n<parameter=y>\nb", [tool("f", x={"type": "string"})],
         "the value contains markup"),
    ],
)  # fmt: skip
def test_values_that_are_read_otherwise(
    template: Template, value: Any, tools: Any, cause: str
) -> None:
    found = compared(template, user("q"), bot(tool_calls=[call("f", x=value)]), tools=tools)
    assert found[0] == (1, "message", "tool_calls[0].x", cause)


def test_a_name_with_markup(template: Template) -> None:
    found = compared(template, user("q"), bot(tool_calls=[call("f>g")]))
    assert (1, "message", "tool_calls", "a name, a value or the text contains markup") in found


def test_a_message_is_a_note(template: Template) -> None:
    messages = [user("q"), bot(" x")]
    found = one(messages, template.render(messages), 1, template).finding(4)
    assert (found.code, found.severity, found.row, found.field) == (
        "QC-DATA-059", "note", 4, "messages[1].content",
    )  # fmt: skip
    assert found.message == (
        "the turn is not trained as the row has it: the template trims whitespace "
        "(trained 'x', row ' x')"
    )


def test_placeholders_are_expanded_in_both(template: Template) -> None:
    messages = [user("PIC"), bot("b")]

    def expand(text: str, count: int) -> str:
        assert count == 1
        return text.replace("PIC", "PICPIC")

    text = template.render(messages).replace("PIC", "PICPIC")
    assert parity(messages, None, [sample(text, 1)], QWEN35, template, expand=expand) == ()


def test_without_a_parser_messages_are_not_compared(template: Template) -> None:
    messages = [user("q"), bot(" x")]
    plain = replace(QWEN35, parse=None)
    assert parity(messages, None, [sample(template.render(messages), 1)], plain, template) == ()
