"""Rows that almost have a known form: each is refused with a fix, and the fix makes it readable."""

from __future__ import annotations

from typing import Any

import pytest
from support.chat_kit import bot, call, user

from qcore.api.media import RowError
from qcore.data.formats import Formats
from qcore.data.rows import RowCheck
from qcore_qwen35.chat import QWEN35

Row = dict[str, Any]
QA = [user("q"), bot("a")]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def read(row: Row, **options: Any) -> None:
    """Convert and check a row.

    Raises:
        RowError: the first problem.
    """
    RowCheck(QWEN35)(1, Formats().convert(row, **options)[1])


# row, code, place, words of the fix, what the fix says: another row, or options
ODD: dict[str, tuple[Row, str, str, str, Row]] = {
    "a number as content": (
        {"messages": [user("q"), bot(42)]}, "QC-DATA-006", "messages[1].content",
        "write it as a string", {"messages": [user("q"), bot("42")]},
    ),
    "an object as content": (
        {"messages": [user("q"), bot({"text": "a"})]}, "QC-DATA-006", "messages[1].content",
        '[{"type": "text", "text": ...}]',
        {"messages": [user("q"), bot([{"type": "text", "text": "a"}])]},
    ),
    "messages by number": (
        {"messages": {"0": QA[0], "1": QA[1]}}, "QC-DATA-005", "messages",
        "write the messages as a list", {"messages": QA},
    ),
    "messages as strings": (
        {"messages": ["q", "a"]}, "QC-DATA-006", "messages[0]", 'write each message as {"role"',
        {"messages": QA},
    ),
    "a message as a row": (
        {"role": "user", "content": "q"}, "QC-DATA-023", "", 'as one row: {"messages": [...]}',
        {"messages": QA},
    ),
    "a completion alone": (
        {"completion": "a"}, "QC-DATA-023", "", "add a prompt",
        {"prompt": "q", "completion": "a"},
    ),
    "token ids": (
        {"input_ids": [1, 2], "labels": [-100, 2]}, "QC-DATA-021", "input_ids",
        "take the rows that the ids were made from", {"messages": QA},
    ),
    "a prompt that ends in the answer": (
        {"prompt": [user("q"), bot("I ")], "completion": [bot("say.")]}, "QC-DATA-051", "prompt",
        "move the start of the answer from prompt to completion",
        {"prompt": [user("q")], "completion": [bot("I say.")]},
    ),
    "several answers": (
        {"query": "q", "response": ["a", "b"]}, "QC-DATA-005", "response",
        "a row for each", {"query": "q", "response": "a"},
    ),
    "functions by name": (
        {"messages": QA, "tools": {"f": TOOL["function"]}}, "QC-DATA-007", "tools[0]",
        "write tools as a list", {"messages": QA, "tools": [TOOL]},
    ),
    "two reasonings": (
        {"messages": [user("q"), bot("<think>\nr\n</think>\n\na", reasoning_content="r")]},
        "QC-DATA-016", "messages[1].content", "keep one of them",
        {"messages": [user("q"), bot("a", reasoning_content="r")]},
    ),
    "a think block that does not end": (
        {"messages": [user("q"), bot("<think>r a")]}, "QC-DATA-016", "messages[1].content",
        "write the reasoning as reasoning_content",
        {"messages": [user("q"), bot("a", reasoning_content="r")]},
    ),
    "tags in the reasoning": (
        {"messages": [user("q"), bot("a", reasoning_content="<think>r</think>")]},
        "QC-DATA-016", "messages[1].reasoning_content", "write the reasoning alone",
        {"messages": [user("q"), bot("a", reasoning_content="r")]},
    ),
    "a second text": (
        {"messages": [user("q"), {**bot("a"), "text": "b"}]}, "QC-DATA-024", "messages[1].text",
        "write both as content", {"messages": [user("q"), bot("a b")]},
    ),
    "two spellings that differ": (
        {"conversations": [user("q"), bot("a", value="b")]}, "QC-DATA-024",
        "conversations[1].value", "write both as content", {"messages": [user("q"), bot("a b")]},
    ),
    "reasoning of the user": (
        {"messages": [{**user("q"), "reasoning_content": "r"}, bot("a")]}, "QC-DATA-024",
        "messages[0].reasoning_content", "write it into the assistant turn",
        {"messages": [user("q"), bot("a", reasoning_content="r")]},
    ),
    "a call of the user": (
        {"messages": [{**user("q"), "tool_calls": [call("f", {})]}, bot("a")]}, "QC-DATA-024",
        "messages[0].tool_calls", "write it into the assistant turn",
        {"messages": [user("q"), bot("a", tool_calls=[call("f", {})])]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_the_fix_makes_the_row_readable(case: str) -> None:
    row, code, at, fix, mended = ODD[case]
    with pytest.raises(RowError) as caught:
        read(row)
    error = caught.value
    assert (error.code, error.at) == (code, at)
    assert fix in str(error.fix)
    read(mended)
    if "ignore_columns" in str(error.fix):
        read(row, ignore=[f"messages[].{at.rpartition('.')[2]}"])


@pytest.mark.parametrize(
    "turn",
    [{**bot("a"), "text": "a"}, bot("a", value="a"), {**bot("a"), "from": "gpt", "value": "a"},
     {**bot("One. Two."), "text": "Two."}, {**bot([{"type": "text", "text": "a"}]), "text": "a"},
     {**bot("a"), "text": ""}, {**bot("a"), "text": None}],
)  # fmt: skip
def test_a_text_that_is_repeated_passes(turn: Row) -> None:
    _, done = Formats().convert({"messages": [user("q"), turn]})
    assert done["messages"][1]["content"] == turn["content"]


@pytest.mark.parametrize("key", ["reasoning_content", "tool_calls", "function_call", "refusal"])
@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_empty_keys_of_the_assistant_pass_in_other_turns(key: str, empty: Any) -> None:
    read({"messages": [{**user("q"), key: empty}, bot("a")]})
