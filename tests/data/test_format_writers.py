"""Foreign rows written by writers of their own are read back as the canonical rows they hold."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import pytest
from support import foreign_rows as foreign
from support.json_schema import problems

from qcore.data.formats import Formats, load_formats, schema

FORMATS = Formats(kinds=("image", "video"))
TOOLS = {"calls": 2, "ids": False}
PAIRS: dict[str, Any] = {"reasoning": False}
#: name -> writer, format, features of the conversations, field mapping
WRITERS: dict[str, tuple[foreign.Writer, str, dict[str, Any], Mapping[str, Any]]] = {
    "openai": (
        foreign.openai, "openai",
        {"calls": 2, "ids": True, "reasoning": True, "train": True}, {},
    ),
    "openai functions": (foreign.openai_functions, "openai", {"calls": 1}, {}),
    "trl": (foreign.trl_pair, "trl", {"calls": 2, "reasoning": True}, {}),
    "sharegpt": (foreign.sharegpt, "sharegpt", {**TOOLS, "train": True}, {}),
    "alpaca": (foreign.alpaca, "alpaca", {}, {}),
    "ms-swift pair": (foreign.ms_swift_pair, "ms-swift", {}, {}),
    "ms-swift messages": (foreign.ms_swift_messages, "openai", {**TOOLS, "train": True}, {}),
    "anthropic": (
        foreign.anthropic, "anthropic", {"calls": 2, "ids": True, "reasoning": True}, {},
    ),
    "axolotl": (
        foreign.axolotl, "openai", {**TOOLS, "reasoning": True, "train": True}, foreign.AXOLOTL,
    ),
    "llama-factory sharegpt": (
        foreign.factory_sharegpt, "sharegpt", {**TOOLS, "said": False}, foreign.FACTORY_SHAREGPT,
    ),
    "llama-factory alpaca": (foreign.factory_alpaca, "alpaca", {}, foreign.FACTORY_ALPACA),
}  # fmt: skip


def only_last(row: foreign.Row) -> foreign.Row:
    """As TRL's pairs are trained: no assistant turn but the completion."""
    *context, last = row["messages"]
    masked = [{**m, "train": False} if m["role"] == "assistant" else m for m in context]
    return {**row, "messages": [*masked, last]}


def folded(row: foreign.Row) -> foreign.Row:
    """A content of one text part as text: both are canonical, and templates render them alike."""
    messages = []
    for message in row["messages"]:
        content = message["content"]
        if isinstance(content, list) and len(content) == 1:
            message = {**message, "content": content[0]["text"]}
        messages.append(message)
    return {**row, "messages": messages}


@pytest.mark.parametrize("name", WRITERS)
def test_fifty_conversations_read_back(name: str) -> None:
    write, expected, features, fields = WRITERS[name]
    rng = random.Random(name)
    seen = set()
    for number in range(50):
        row = foreign.conversation(rng, **features)
        if name == "trl":
            row = only_last(row)
            if number % 3 == 0:
                row["chat_template_kwargs"] = {"enable_thinking": number % 2 == 0}
        written = write(row, rng)
        before = copy.deepcopy(written)
        found, read = FORMATS.convert(written, fields=fields)
        assert folded(read) == row, written
        assert written == before, "the reader mutates its input"
        # An Anthropic row without a block of its API is a row of OpenAI's.
        assert found == expected or (name == "anthropic" and found == "openai")
        assert problems(read, schema()) == []
        seen.add(len(row["messages"]))
    assert len(seen) > 2, "the conversations do not differ"


def test_a_forced_format_reads_the_same() -> None:
    rng = random.Random(5)
    for name in ("openai", "sharegpt", "trl", "alpaca", "ms-swift pair", "anthropic"):
        write, expected, features, _ = WRITERS[name]
        row = foreign.conversation(rng, **features)
        row = only_last(row) if name == "trl" else row
        assert FORMATS.convert(write(row, rng), forced=expected) == (expected, row)


def test_canonical_rows_stay_as_they_are() -> None:
    rng = random.Random(6)
    for _ in range(50):
        row = foreign.conversation(rng, calls=2, ids=True, reasoning=True, train=True)
        row |= {"id": "r1", "metadata": {"source": "made up"}, "train": True}
        row["chat_template_kwargs"] = {"enable_thinking": False}
        assert FORMATS.convert(row) == ("openai", row)


def test_the_environment_has_the_kinds_of_the_installed_plugins() -> None:
    said = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}]
    row = {"messages": said, "images": ["a.png"]}
    _, read = load_formats().convert(row)
    assert read["messages"][0]["content"][0] == {"type": "image", "image": "a.png"}
