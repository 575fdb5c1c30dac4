"""Think blocks: one rule for what a block in content is, and where a rendered one ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.chat_kit import FORMAT, bot

from qcore.data.think_block import (
    block_end,
    block_fault,
    reasoning_of,
    split_block,
    thinking_marks,
    without_reasoning,
)

MARKS = ("<think>", "</think>")


def test_marks_are_those_of_the_prompt_tails() -> None:
    assert thinking_marks(FORMAT) == MARKS
    assert thinking_marks(replace(FORMAT, prompt_tails=("[off]", "[on]"))) is None


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("<think>\nr\n</think>\n\na", ("r", "a")),
        (" \n<think>r</think>a", ("r", "a")),
        ("r</think>a", ("r", "a")),
        ("<think>\n\n</think>\n\n  a\n", ("", "  a\n")),
        ("a", None),
    ],
)
def test_a_block_at_the_start(text: str, split: tuple[str, str] | None) -> None:
    assert split_block(text, MARKS) == split
    message = bot(text)
    parts = bot([{"type": "text", "text": text[:3]}, {"type": "text", "text": text[3:]}])
    for one in (message, parts):
        assert reasoning_of(one, FORMAT) == (split[0] if split else "")
        rest = split[1] if split else one["content"]
        assert without_reasoning(one, FORMAT) == {"role": "assistant", "content": rest}
    assert without_reasoning({**bot("a"), "reasoning_content": "r"}, FORMAT) == bot("a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<think>r", "not one <think> and one </think>"),
        ("<think>a</think><think>b</think>", "not one"),
        ("x <think>r</think>", "text before <think>"),
        ("a</think>b<think>", "text before <think>"),
    ],
)
def test_any_other_text_with_a_tag_is_a_fault(text: str, says: str) -> None:
    assert says in block_fault(text, MARKS)
    assert split_block(text, MARKS) is None


def test_the_end_of_a_rendered_block() -> None:
    text = "<think>\nr\n</think>\n\nanswer</think>"
    assert text[block_end(text, 8, len(text), FORMAT) :] == "answer</think>"
    assert text[block_end(text, 0, len(text), FORMAT) :] == "answer</think>"
    assert block_end(text, 8, 11, FORMAT) == 8
