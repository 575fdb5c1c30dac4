"""Parity: no difference where a row is trained as it is served, else one with its cause."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import FakeCheckpoint, own_tokenizer, write_rows
from support.chat_rows import Writer
from support.template_kit import family_template
from support.tiers import fast
from tokenizers import Regex, Tokenizer, pre_tokenizers

from qcore.api import ChatFormat
from qcore.checkpoint.chat_template import Template
from qcore.checkpoint.tokenizer import load_tokenizer
from qcore.data.policies import Policies
from qcore.data.rejects import Rejects
from qcore.data.rendering.masking import IGNORED, Encoded, Example
from qcore.data.rendering.pieces import normalized
from qcore.data.rendering.renderer import Options, Renderer
from qcore.data.sources.source import Source
from qcore.data.views.parity import Difference, parity
from qcore.data.views.serving import ParityReport, compare_with_serving
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


def splitting_tokenizer() -> Tokenizer:
    """The own tokenizer with newlines apart from what follows them, as Qwen's has them."""
    made = own_tokenizer()
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return made


PLAIN = splitting_tokenizer()


def sample(
    messages: list[dict[str, Any]], text: str, *turns: int, tokenizer: Tokenizer = PLAIN
) -> Encoded:
    """A sample of a rendering, masked by scanning its text: `turns` are the trained messages."""
    tokenizer, text = tokenizer, normalized(text, tokenizer)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    header, close = "<|im_start|>assistant\n", "<|im_end|>"
    starts = [at.end() for at in re.finditer(re.escape(header), text)]
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    labels, ends = [IGNORED] * len(encoding.ids), []
    for start in (starts[answers.index(n)] for n in turns if answers.index(n) < len(starts)):
        for tail in QWEN35.prompt_tails:
            if text.startswith(tail, start):
                start += len(tail)
                break
        end = text.index(close, start) + len(close)
        for n, (a, _) in enumerate(encoding.offsets):
            if start <= a < end:
                labels[n] = encoding.ids[n]
        ends.append(sum(a < end for a, _ in encoding.offsets))
    ends += [len(labels)] * (len(turns) - len(ends))
    example = Example(
        ids=array("i", encoding.ids), labels=array("i", labels), line=1, turns=len(turns),
        supervised=len(labels) - labels.count(IGNORED),
    )  # fmt: skip
    return Encoded(
        example=example, text=text, char_spans=(), turns=turns, ends=tuple(ends), reasoned=()
    )


def served(row: dict[str, Any], template: Template, tokenizer: Tokenizer = PLAIN) -> list[Encoded]:
    """A sample for each assistant turn, as it is when it is served."""
    messages, tools = row["messages"], row.get("tools")
    return [
        sample(messages, template.render(messages[: index + 1], tools), index, tokenizer=tokenizer)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def compared(
    template: Template, *messages: dict[str, Any], tools: Any = None, tokenizer: Tokenizer = PLAIN
) -> list[tuple[int, str, str, str]]:
    row = {"messages": list(messages), "tools": tools}
    samples = served(row, template, tokenizer)
    found = parity(row["messages"], tools, samples, QWEN35, template, tokenizer)
    return [(one.turn, one.kind, one.field, one.cause) for one in found]


def sweep(template: Template, chat_format: ChatFormat, tokenizer: Tokenizer, count: int) -> int:
    writer, turns = Writer(11), 0
    for _ in range(count):
        row = writer.row()
        samples = served(row, template, tokenizer)
        found = parity(row["messages"], row.get("tools"), samples, chat_format, template, tokenizer)
        assert found == (), (found, row)
        turns += len(samples)
    return turns


def test_turns_as_they_are_served(template: Template) -> None:
    assert sweep(template, QWEN35, PLAIN, 20) > 20


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


@pytest.mark.parametrize("sku", fast(REAL, "qwen3.5/Qwen3.5-4B", "qwen3.6/Qwen3.6-27B"))
def test_samples_of_a_run_are_what_is_served(
    shared: Path, tmp_path: Path, sku: str, real: Tokenizer
) -> None:
    assert run(shared, tmp_path, sku, real, 6) > 15


@pytest.mark.slow
@pytest.mark.parametrize("sku", REAL)
def test_samples_of_five_hundred_rows_are_what_is_served(
    shared: Path, tmp_path: Path, sku: str, real: Tokenizer
) -> None:
    assert run(shared, tmp_path, sku, real, 500) > 500


def run(shared: Path, tmp_path: Path, sku: str, tokenizer: Tokenizer, count: int) -> int:
    """Read rows as a run does, with repairs and shared samples; the number of trained turns.

    In a mode that the user fixed, a quarter of the rows is read.
    """
    writer, turns = Writer(12), 0
    rows = [writer.row() for _ in range(count)]
    for mode in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        options = Options(variables=mode, policies=Policies(bad_rows="skip", bad_rows_limit=1.0))
        some = rows[: max(6, count // 4)] if mode else rows
        report, rejects = reported(shared, tmp_path, sku, tokenizer, some, options)
        assert (report.differing, report.differences, report.notes) == (0, (), ()), report
        # A turn with reasoning cannot be served without thinking.
        assert {entry["code"] for entry in rejects.entries()} <= {"QC-DATA-041"}
        assert bool(rejects.count) == (mode == {"enable_thinking": False})
        turns += report.turns
    return turns


def reported(
    shared: Path, tmp_path: Path, sku: str, tokenizer: Tokenizer, rows: Any, options: Options
) -> tuple[ParityReport, Rejects]:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    text = (shared / "skus" / sku / "chat_template.jinja").read_text(encoding="utf-8")
    with Template(text, sku) as template:
        return report_of(template, REAL[sku], tokenizer, path, options)


def report_of(
    template: Template, chat_format: ChatFormat, tokenizer: Tokenizer, path: Path, options: Options
) -> tuple[ParityReport, Rejects]:
    rejects = Rejects()
    renderer = Renderer(template, chat_format, tokenizer, options, rejects)
    return compare_with_serving(renderer, [Source(name="rows", files=(path,))]), rejects


# Prompts.


def one(
    messages: list[dict[str, Any]], text: str, turn: int, template: Template, **more: Any
) -> Difference:
    made = sample(messages, text, turn)
    (found,) = parity(messages, None, [made], QWEN35, template, PLAIN, **more)
    return found


def test_history_that_serving_shows_otherwise(template: Template) -> None:
    """The rendering of the whole row leaves out the think block of the first answer."""
    messages = [user("a"), bot("b", reasoning_content="r"), user("c"), bot("d")]
    text = template.render(messages)
    found = parity(messages, None, [sample(messages, text, 1, 3)], QWEN35, template, PLAIN)
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
    messages = [user("a"), bot("b", reasoning_content="r")]
    found = one(messages, template.render(messages), 1, template,
                variables={"enable_thinking": False})  # fmt: skip
    assert found.kind == "prompt"
    assert found.cause == "serving prompts for this turn without thinking"
    # The turn has to close the block that its prompt opens: no token may hold both.
    messages = [user("a"), bot("b")]
    found = one(messages, template.render(messages), 1, template,
                variables={"enable_thinking": True})  # fmt: skip
    assert found.kind == "tokens"


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
        text = template.render(messages)
        encoding = tokenizer.encode(text)
        example = Example(
            ids=array("i", encoding.ids), labels=array("i", encoding.ids), line=1, turns=1,
            supervised=1,
        )  # fmt: skip
        made = Encoded(
            example=example, text=text, char_spans=(), turns=(1,), ends=(len(encoding.ids),),
            reasoned=(),
        )  # fmt: skip
        found = parity(messages, None, [made], chat_format, template, tokenizer)
    assert [(one.kind, one.turn) for one in found] == [("tokens", 1)]
    assert "merges" in found[0].finding(1).message


def test_a_tokenizer_that_cuts_newlines_by_what_follows(template: Template) -> None:
    """GPT-2's pre-tokenizer, unlike Qwen's: two newlines before a word are two tokens."""
    found = compared(template, user("q"), bot("x"), tokenizer=own_tokenizer())
    assert [(turn, kind) for turn, kind, _, _ in found] == [(1, "tokens")]


# Labels.


def kinds(template: Template, messages: list[dict[str, Any]], made: Encoded) -> list[str]:
    found = parity(messages, None, [made], QWEN35, template, PLAIN)
    assert all(one.finding(1).message for one in found)
    return [f"{one.kind}: {one.cause}" for one in found]


def test_labels_that_are_not_the_reply(template: Template) -> None:
    messages = [user("a"), bot("b c"), user("d"), bot("e f")]
    made = sample(messages, template.render(messages), 3)
    first = next(n for n, label in enumerate(made.example.labels) if label != IGNORED)
    last = made.ends[0] - 1
    assert kinds(template, messages, made) == []
    prompt = "labels: a token of the prompt is trained"
    masked = f"labels: a token of the reply has the label {IGNORED}"
    for at, label, says in (
        (first - 1, 5, prompt),
        (2, 5, prompt),
        (first, IGNORED, masked),
        (last, IGNORED, masked),
        (first + 1, 7, "labels: a token of the reply has the label 7"),
        (last + 1, 5, "labels: a token after the turn is trained"),
    ):
        labels = array("i", made.example.labels)
        labels[at] = label
        wrong = replace(made, example=replace(made.example, labels=labels))
        assert kinds(template, messages, wrong) == [says], at


def test_ids_that_are_not_the_text(template: Template) -> None:
    messages = [user("a"), bot("b c")]
    made = sample(messages, template.render(messages), 1)
    first = next(n for n, label in enumerate(made.example.labels) if label != IGNORED)
    for at, says in (
        (2, "tokens: the tokens of the prompt are not those of its text"),
        (first - 1, "tokens: the tokenizer merges the end of the prompt with the reply"),
        (first, "tokens: the tokens of the reply are not those of its text"),
    ):
        ids, labels = array("i", made.example.ids), array("i", made.example.labels)
        ids[at] = 350
        if labels[at] != IGNORED:
            labels[at] = 350
        wrong = replace(made, example=replace(made.example, ids=ids, labels=labels))
        assert kinds(template, messages, wrong) == [says], at
    ids, labels = made.example.ids[:-2], made.example.labels[:-2]
    wrong = replace(made, example=replace(made.example, ids=ids, labels=labels), ends=(len(ids),))
    assert kinds(template, messages, wrong) == ["labels: the turn does not end"]


LONG = [
    user("2+2?"), bot("4 " * 30, reasoning_content="pair"), user("and 3?"), bot("7 " * 30),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "reasoning"),
    fast(
        [
            (policy, reasoning)
            for policy in ("truncate_turns", "truncate_tokens")
            for reasoning in ("train", "mask", "drop")
        ],
        ("truncate_turns", "train"),
        ("truncate_tokens", "mask"),
        names=2,
    ),
)
def test_rows_that_are_cut(tmp_path: Path, policy: str, reasoning: str) -> None:
    path, turns = write_rows(tmp_path / "rows.jsonl", [{"messages": LONG}]), []
    with family_template(keep="true") as template:
        for limit in (60, 100, 150, 1000):
            policies = Policies(long_rows=policy, reasoning=reasoning)
            options = Options(max_length=limit, policies=policies)
            report, _ = report_of(template, QWEN35, PLAIN, path, options)
            assert report.differences == ()
            turns.append(report.turns)
    assert turns == sorted(turns)
    assert {1, 2} <= {*turns}


def test_notes_are_apart(shared: Path, tmp_path: Path, real: Tokenizer) -> None:
    rows = [{"messages": [user("q"), bot(text)]} for text in (" x", "y", "z\n")]
    report, _ = reported(shared, tmp_path, "qwen3.5/Qwen3.5-4B", real, rows, Options())
    assert (report.turns, report.differing, report.differences) == (3, 0, ())
    assert [row for row, _ in report.notes] == [1, 3]
    assert report.noted() == [
        {"cause": "the template trims whitespace", "turns": 2,
         "first": "row 1, messages[1].content", "trained": "'x'", "row": "' x'"}
    ]  # fmt: skip
    assert len(report.as_json()["notes"]) == 2
    options = Options(policies=Policies(history="as_rendered"))
    report, _ = reported(
        shared, tmp_path, "qwen3.5/Qwen3.5-4B", real, [{"messages": LONG}], options
    )
    assert [one.kind for _, one in report.differences] == ["prompt"]
    assert report.differing == 1


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
    made = sample(messages, text, 1)
    assert parity(messages, None, [made], QWEN35, template, PLAIN, expand=expand) == ()


def test_without_a_parser_messages_are_not_compared(template: Template) -> None:
    messages = [user("q"), bot(" x")]
    plain = replace(QWEN35, parse=None)
    made = sample(messages, template.render(messages), 1)
    assert parity(messages, None, [made], plain, template, PLAIN) == ()
