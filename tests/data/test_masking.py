"""Masks: what is trained, decoded back to text, is the assistant's and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import (  # fmt: skip
    FORMAT,
    TEMPLATE,
    FakeCheckpoint,
    bot,
    call,
    encode_row,
    own_template,
    own_tokenizer,
    user,
)
from tokenizers import Tokenizer

from qcore.api.media import RowError
from qcore.checkpoint.chat_template import Template
from qcore.checkpoint.tokenizer import load_tokenizer
from qcore.data.rendering.masking import highest_id, labels, spans
from qcore.data.rendering.pieces import normalized
from qcore.data.rendering.template_check import prove_mask
from qcore.data.rows import ChatRow, RowCheck
from qcore.errors import InputError

THINK = "qwen3.5/Qwen3.5-4B"
NO_THINK = "qwen3.5/Qwen3.5-0.8B"
NEXT = "qwen3.6/Qwen3.6-27B"
END = "<|im_end|>"
HINDI, ARABIC = "हिन्दी में उत्तर", "مُحَمَّد كتب"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return own_tokenizer()


@pytest.fixture(scope="session")
def real(shared: Path) -> Tokenizer:
    return load_tokenizer(FakeCheckpoint(shared / "skus" / "tokenizer", None))  # type: ignore[arg-type]


def trained(
    template: Template, tokenizer: Tokenizer, messages: list[dict[str, Any]], **variables: Any
) -> list[str]:
    """Decoded runs of trained tokens."""
    row = RowCheck(FORMAT)(1, {"messages": messages})
    example = encode_row(row, template, tokenizer, FORMAT, 10_000, variables=variables)
    assert len(example.ids) == len(example.labels)
    assert all(label in (-100, id_) for id_, label in zip(example.ids, example.labels))
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs if run]


def xml(name: str, **arguments: str) -> str:
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


MULTI = [
    {"role": "system", "content": "S"},
    user("first " + HINDI),
    bot(" " + HINDI + "\n", reasoning_content="old thought"),
    user("second"),
    bot(ARABIC),
    user("third"),
    bot("naïve e\u0301tude 👍🏽", reasoning_content=f"because {ARABIC}"),
]
LAST_THOUGHT = f"because {ARABIC}\n</think>\n\nnaïve étude 👍🏽" + END
TOOLS = [
    user("weather?"),
    bot("Let me look.", reasoning_content="need it", tool_calls=[call("find", {"town": "Paris"})]),
    {"role": "tool", "content": "sunny"},
    {"role": "tool", "content": "windy"},
    bot(None, tool_calls=[call("find", {}), call("find", {"x": "1"})]),
    {"role": "tool", "content": "rainy"},
    bot("Mixed."),
]


@pytest.mark.parametrize("sku", [THINK, NO_THINK, NEXT])
class TestReal:
    """The hub's templates and tokenizer."""

    @pytest.fixture
    def template(self, shared: Path, sku: str) -> Any:
        path = shared / "skus" / sku / "chat_template.jinja"
        with Template(path.read_text(encoding="utf-8"), sku) as template:
            yield template

    def test_several_turns(self, template: Template, real: Tokenizer) -> None:
        assert trained(template, real, MULTI) == [HINDI + END, ARABIC + END, LAST_THOUGHT]

    def test_empty_think_block_is_context(self, template: Template, real: Tokenizer) -> None:
        for more in ({}, {"reasoning_content": ""}, {"reasoning_content": " \n"}):
            assert trained(template, real, [user("q"), bot("a", **more)]) == ["a" + END]

    def test_inline_think_block(self, template: Template, real: Tokenizer) -> None:
        said = "<think>\nR\n</think>\n\nA"
        assert trained(template, real, [user("q"), bot(said)]) == ["R\n</think>\n\nA" + END]

    def test_tool_calls_and_results(self, template: Template, real: Tokenizer) -> None:
        first = xml("find", town="Paris")
        assert trained(template, real, TOOLS) == [
            f"need it\n</think>\n\nLet me look.\n\n{first}" + END,
            f"{xml('find')}\n{xml('find', x='1')}" + END,
            "Mixed." + END,
        ]

    def test_proof(self, template: Template, real: Tokenizer, sku: str) -> None:
        prove_mask(template, FORMAT, real)
        prove_mask(template, FORMAT, real, variables={"enable_thinking": sku == NO_THINK})
        prove_mask(template, FORMAT, real, variables={"preserve_thinking": True})

    def test_prompt_is_never_trained(self, template: Template, real: Tokenizer) -> None:
        """What inference sees before an answer is exactly what is masked before it."""
        for more, thinking in (({"reasoning_content": "R"}, True), ({}, False)):
            messages = [user("q"), bot("a", **more)]
            row = RowCheck(FORMAT)(1, {"messages": messages})
            example = encode_row(row, template, real, FORMAT, 100)
            prompt = template.render(
                messages[:1], add_generation_prompt=True, enable_thinking=thinking
            )
            ids = real.encode(prompt, add_special_tokens=False).ids
            masked = [n for n, label in enumerate(example.labels) if label == -100]
            assert list(example.ids[: len(ids)]) == ids
            assert masked == [*range(len(ids)), len(example.ids) - 1]


def test_preserved_thinking(shared: Path, real: Tokenizer) -> None:
    path = shared / "skus" / NEXT / "chat_template.jinja"
    with Template(path.read_text(encoding="utf-8"), NEXT) as template:
        got = trained(template, real, MULTI, preserve_thinking=True)
    assert got == [f"old thought\n</think>\n\n{HINDI}" + END, ARABIC + END, LAST_THOUGHT]


def test_real_ids(shared: Path, real: Tokenizer) -> None:
    with Template((shared / "skus" / THINK / "chat_template.jinja").read_text(), "t") as template:
        row = ChatRow(line=1, messages=(user("हिन्दी"), bot("مُحَمَّد", reasoning_content="हिन्दी")))
        example = encode_row(row, template, real, FORMAT, 100)
    hindi, arabic = [215989, 150127, 177453], [9873, 62422, 28850, 168623]
    answer = [*hindi, 198, 248069, 271, *arabic, 248046]
    prompt = [248045, 846, 198, *hindi, 248046, 198, 248045, 74455, 198, 248068, 198]
    assert list(example.ids) == [*prompt, *answer, 198]
    assert list(example.labels) == [-100] * len(prompt) + answer + [-100]
    assert example.supervised == len(answer)
    assert highest_id(real) == 248_076


# The same, with nothing but what the tests bring.


def test_several_turns(tokenizer: Tokenizer) -> None:
    with own_template() as template:
        got = trained(template, tokenizer, MULTI)
        kept = trained(template, tokenizer, MULTI, keep_thinking=True)
    assert got == [HINDI + END, ARABIC + END, LAST_THOUGHT]
    assert kept == [f"old thought\n</think>\n\n{HINDI}" + END, ARABIC + END, LAST_THOUGHT]


def test_empty_think_block_is_context(tokenizer: Tokenizer) -> None:
    with own_template() as template:
        assert trained(template, tokenizer, [user("q"), bot("a")]) == ["a" + END]
        no_block = own_template(TEMPLATE.replace("loop.index0 > ns.last", "false"))
        assert trained(no_block, tokenizer, [user("q"), bot("a", reasoning_content="R")]) == [
            "a" + END
        ]
        no_block.close()


def test_tool_calls_and_results(tokenizer: Tokenizer) -> None:
    with own_template() as template:
        got = trained(template, tokenizer, TOOLS)
    assert got == [
        'need it\n</think>\n\nLet me look.<tool_call>find{"town": "Paris"}</tool_call>' + END,
        '<tool_call>find{}</tool_call><tool_call>find{"x": "1"}</tool_call>' + END,
        "Mixed." + END,
    ]


def test_two_assistant_turns_in_a_row(tokenizer: Tokenizer) -> None:
    with own_template() as template:
        assert trained(template, tokenizer, [user("q"), bot("a"), bot("b")]) == [
            "a" + END,
            "b" + END,
        ]


@pytest.mark.parametrize("text", ["e\u0301", "x\u0323\u0307y", "नि", "👩🏽‍🚀", "ｶﾞ", "각", "\u0301"])
def test_characters_of_several_tokens_are_trained_whole(tokenizer: Tokenizer, text: str) -> None:
    said = f"{text} b {text}{text}"
    with own_template() as template:
        (got,) = trained(template, tokenizer, [user(text), bot(said)])
    assert got == normalized(said, tokenizer) + END


def test_text_is_composed_as_the_tokenizer_does(tokenizer: Tokenizer) -> None:
    assert normalized("e\u0301", tokenizer) == "é"
    plain = own_tokenizer()
    plain.normalizer = None
    assert normalized("e\u0301", plain) == "e\u0301"
    with own_template() as template:
        assert trained(template, plain, [user("q"), bot("e\u0301")]) == ["e\u0301" + END]


HEAD = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("a<|im_end|>", "a<|im_end|>"),
        ("<think>\nr\n</think>\n\na<|im_end|>\n", "r\n</think>\n\na<|im_end|>"),
        ("<think>\n\n</think>\n\na<|im_end|>\n", "a<|im_end|>"),
        ("<think>\n\n</think>\n\n<|im_end|>\n", "<|im_end|>"),
        ("<think>\n\n</think>a<|im_end|>\n", "\n</think>a<|im_end|>"),
        ("<think>a<|im_end|>\n", "<think>a<|im_end|>"),
        ("<|im_end|>", "<|im_end|>"),
    ],
)
def test_spans_begin_after_the_longest_tail(body: str, wanted: str) -> None:
    text = "<|im_start|>user\nq<|im_end|>\n" + HEAD + body
    for tails in (FORMAT.prompt_tails, FORMAT.prompt_tails[::-1]):
        ((start, end),) = spans(text, replace(FORMAT, prompt_tails=tails), 1)
        assert text[start:end] == wanted


@pytest.mark.parametrize(
    ("text", "turns", "code"),
    [
        (HEAD + "a<|im_end|>", 2, "QC-MASK-001"),
        (HEAD + "a<|im_end|>", 0, "QC-MASK-001"),
        ("<|im_start|>user\nq<|im_end|>", 1, "QC-MASK-001"),
        (HEAD + "a", 1, "QC-MASK-002"),
        (HEAD + "a" + HEAD + "b<|im_end|>", 1, "QC-MASK-002"),
    ],
)
def test_another_number_of_turns_is_refused(text: str, turns: int, code: str) -> None:
    with pytest.raises(RowError) as caught:
        spans(text, FORMAT, turns)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("offsets", "wanted"),
    [
        ([(0, 4), (4, 6), (6, 9), (9, 10)], "-xx-"),  # exact
        ([(0, 3), (3, 6), (6, 9), (9, 10)], "--x-"),  # straddles the start
        ([(0, 4), (4, 8), (8, 10)], "-xx"),  # straddles the end
        ([(0, 4), (4, 5), (4, 5), (4, 5), (5, 9)], "-xxxx"),  # bytes of one character
        ([(3, 4), (3, 4), (4, 5), (8, 9), (8, 9), (9, 10), (9, 10)], "--xxx--"),
        ([(0, 4), (5, 6), (8, 9), (10, 11)], "-xx-"),  # characters of no token
        ([(0, 2), (10, 12)], "--"),
    ],
)
def test_labels_follow_offsets(offsets: list[tuple[int, int]], wanted: str) -> None:
    ids = list(range(10, 10 + len(offsets)))
    got = labels(ids, offsets, [(4, 9)])
    assert list(got) == [i if w == "x" else -100 for i, w in zip(ids, wanted, strict=True)]


def test_labels_of_several_spans_skip_empty_and_passed_ones() -> None:
    offsets = [(n, n + 1) for n in range(8)]
    got = labels(list(range(8)), offsets, [(1, 2), (3, 3), (4, 6)])
    assert [n for n, label in enumerate(got) if label != -100] == [1, 4, 5]
    assert list(labels([5], [(0, 1)], [])) == [-100]


def error_of(row: ChatRow, template: Template, tokenizer: Tokenizer, **more: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        encode_row(row, template, tokenizer, FORMAT, more.pop("max_length", 1000), **more)
    assert caught.value.field == f"line {row.line}"
    return caught.value


def test_row_too_long_names_tokens_and_limit(tokenizer: Tokenizer) -> None:
    row = ChatRow(line=17, messages=(user("q"), bot("word " * 50)))
    with own_template() as template:
        length = len(encode_row(row, template, tokenizer, FORMAT, 1000).ids)
        assert len(encode_row(row, template, tokenizer, FORMAT, length).ids) == length
        error = error_of(row, template, tokenizer, max_length=length - 1)
    assert error.code == "QC-DATA-011"
    assert f"{length} tokens" in error.message
    assert f"at most {length - 1}" in error.message


def test_row_masked_whole(tokenizer: Tokenizer) -> None:
    row = ChatRow(line=9, messages=(user("q"),))
    with own_template() as template:
        assert error_of(row, template, tokenizer).code == "QC-DATA-012"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'<think>\\n' + (m", "'<think>' + (m"),  # no known tail
        ("m.content | default('') | trim", "'fixed'"),  # loses the answer
        ("'\\n' + m.content | trim", "'\\n'"),  # loses the question
        ("{{- '<|im_end|>\\n' }}\n    {%- elif m.role == 'tool'",
         "{{- '\\n' }}\n    {%- elif m.role == 'tool'"),  # does not end turns
        ("{{- '<|im_start|>assistant\\n' }}\n        {%- if", "{{- '<|bot|>' }}\n        {%- if"),
        ("assistant\\n<think>\\n' }}{% endif", "assistant\\nSure: ' }}{% endif"),  # prompt
        ("f.name + (f.arguments", "(f.arguments"),  # loses the call's name
        ("<|im_start|>user\\n<tool", "<|im_start|>assistant\\n<tool"),  # results as answers
        ("m.content | default('') | trim }}",
         "m.content | default('') | trim }}{{ messages[0].content }}"),  # repeats another turn
    ],
)  # fmt: skip
def test_template_that_reads_otherwise_is_refused(tokenizer: Tokenizer, old: str, new: str) -> None:
    assert old in TEMPLATE
    with own_template() as template:
        prove_mask(template, FORMAT, tokenizer)
    with (
        own_template(TEMPLATE.replace(old, new)) as template,
        pytest.raises(InputError) as caught,
    ):
        prove_mask(template, FORMAT, tokenizer)
    assert caught.value.code == "QC-MASK-003"
    assert caught.value.file == "own.jinja"


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_tails": ("<think>\n",)},
        {"prompt_tails": ()},
        {"turn_end": "<|im_end|>\n"},
        {"turn_start": "<|start|>"},
        {"assistant": "user"},
        {"role_end": ""},
        {"stop_tokens": ("<|stop|>",)},
    ],
)
def test_format_that_says_otherwise_is_refused(tokenizer: Tokenizer, wrong: dict[str, Any]) -> None:
    with own_template() as template, pytest.raises(InputError) as caught:
        prove_mask(template, replace(FORMAT, **wrong), tokenizer)
    assert caught.value.code == ("QC-PRE-003" if "stop_tokens" in wrong else "QC-MASK-003")


def test_tokenizer_is_read_as_written_but_never_cuts(tmp_path: Path) -> None:
    made = own_tokenizer()
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(FakeCheckpoint(tmp_path, None))  # type: ignore[arg-type]
    assert found.encode("user " * 20).ids == own_tokenizer().encode("user " * 20).ids


@pytest.mark.parametrize("text", [None, "{}", "{", '{"model": {"type": "BPE"}}', "\xff"])
def test_tokenizer_that_does_not_load_is_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError) as caught:
        load_tokenizer(FakeCheckpoint(tmp_path, None))  # type: ignore[arg-type]
    assert caught.value.code == "QC-TOKENIZER-001"
    assert "\n" not in caught.value.message
