"""Rows with values of the wrong kind anywhere: converted, or refused by field; nothing else."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
from support import foreign_rows as foreign

from qcore.api.media import RowError
from qcore.data.formats import Formats

FORMATS = Formats(kinds=("image", "video"))
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 10**30, "", " ", "x", "[]", "{}", "[1]", "null", '"s"', '{"a":',
    [], {}, [[]], [{}], [None], ["x"], [1, "x"], {"a": 1}, {"role": "user"}, {"type": "image"},
    {"type": "tool_use"}, {"function": 3}, {"name": 1}, {"bytes": 3}, [{"type": "text"}],
    [{"type": "image", "image": {"bytes": [1]}}], {"source": {"type": "base64"}}, b"\x89PNG",
)  # fmt: skip
KEYS = (
    "messages", "conversations", "role", "from", "content", "value", "tools", "functions", "system",
    "tool_calls", "function_call", "train", "weight", "loss", "train_detail", "images", "image",
    "video", "prompt", "completion", "instruction", "output", "input", "history", "query",
    "response", "answers", "chat_template_kwargs", "id", "metadata", "parallel_tool_calls",
    "refusal", "type", "text", "thinking", "reasoning_content", "name", "source", "arguments",
    "segments", "chosen", "label",
)  # fmt: skip
WRITERS = (
    foreign.openai, foreign.sharegpt, foreign.anthropic, foreign.trl_pair, foreign.alpaca,
    foreign.ms_swift_pair, foreign.ms_swift_messages,
)  # fmt: skip


def places(value: Any, seen: list[Any]) -> list[Any]:
    """Every container inside a value."""
    if isinstance(value, dict | list):
        seen.append(value)
        for item in value.values() if isinstance(value, dict) else value:
            places(item, seen)
    return seen


def broken(rng: random.Random) -> Iterator[Any]:
    for write in WRITERS:
        calls = 0 if write in (foreign.alpaca, foreign.ms_swift_pair) else 1
        row = write(foreign.conversation(rng, calls=calls, ids=True, train=True), rng)
        for _ in range(rng.randint(1, 3)):
            where = rng.choice(places(row, []))
            junk = copy.deepcopy(rng.choice(JUNK))
            if isinstance(where, dict):
                where[rng.choice((*where, *KEYS)) if rng.random() < 0.5 else rng.choice(KEYS)] = (
                    junk
                )
            elif where:
                where[rng.randrange(len(where))] = junk
        yield row


@pytest.mark.parametrize("seed", range(6))
def test_nothing_but_a_row_error(seed: int) -> None:
    rng = random.Random(seed)
    read = refused = 0
    for _ in range(150):
        for row in broken(rng):
            before = repr(row)
            try:
                _, done = FORMATS.convert(row)
            except RowError as bad:
                refused += bad.error(None, 1).code.startswith("QC-DATA-0")
            else:
                read += 1
                assert isinstance(done["messages"], list)
                assert all(isinstance(message["role"], str) for message in done["messages"])
            assert repr(row) == before, "the reader mutates its input"
    assert read > 100
    assert refused > 100


@pytest.mark.parametrize("forced", FORMATS.names)
def test_any_row_under_any_format(forced: str) -> None:
    rng = random.Random(forced)
    for _ in range(40):
        for row in broken(rng):
            try:
                FORMATS.convert(row, forced=forced)
            except RowError:
                continue


def test_long_rows_are_read_in_linear_time() -> None:
    """Quadratic reading of these would take minutes."""
    call = {"from": "function_call", "value": '{"name": "f"}'}
    items = [{"from": "human", "value": "q"}, *[call] * 30_000]
    _, row = FORMATS.convert({"conversations": items})
    assert len(row["messages"][1]["tool_calls"]) == 30_000
    media = {"messages": [{"role": "user", "content": "<image>" * 30_000}],
             "images": ["a.png"] * 30_000}  # fmt: skip
    assert len(FORMATS.convert(media)[1]["messages"][0]["content"]) == 30_000
    keys = {"messages": [{"role": "user", "content": "q", **{f"k{i}": i for i in range(30_000)}}]}
    assert len(FORMATS.read(keys).ignored) == 30_000


def test_values_that_are_not_rows() -> None:
    for value in JUNK:
        try:
            FORMATS.convert(value)
        except RowError:
            continue
        pytest.fail(f"{value!r} is read")
