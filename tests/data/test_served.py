"""Samples against a slow oracle: every trained token is what serving produces, in its context."""

from __future__ import annotations

import json
import random
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import FORMAT, FakeCheckpoint, write_rows
from support.served import Oracle, Served, conversation
from support.tiers import fast
from tokenizers import Tokenizer

from qcore.checkpoint.chat_template import Template
from qcore.checkpoint.tokenizer import load_tokenizer
from qcore.data.dataset import Dataset, dataset
from qcore.data.policies import Policies
from qcore.data.rendering.masking import IGNORED, Example
from qcore_qwen35.chat import QWEN35

SKUS = {
    "3.5": "qwen3.5/Qwen3.5-4B",
    "3.5 no-think": "qwen3.5/Qwen3.5-0.8B",
    "3.5 moe": "qwen3.5/Qwen3.5-35B-A3B",
    "3.6": "qwen3.6/Qwen3.6-27B",
}


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Tokenizer:
    return load_tokenizer(FakeCheckpoint(shared / "skus" / "tokenizer", None))  # type: ignore[arg-type]


def encoded(
    shared: Path,
    tmp_path: Path,
    sku: str,
    rows: list[Any],
    tokenizer: Tokenizer,
    policies: Policies | None = None,
    **variables: Any,
) -> tuple[Dataset, Oracle]:
    text = (shared / "skus" / SKUS[sku] / "chat_template.jinja").read_text(encoding="utf-8")
    folder = shared / "skus" / "tokenizer"
    checkpoint: Any = FakeCheckpoint(folder, Template(text, sku))
    found = dataset(
        write_rows(tmp_path / "rows.jsonl", rows), checkpoint, QWEN35, 1 << 16,
        policies=policies, tokenizer=tokenizer, variables=variables,
    )  # fmt: skip
    return found, Oracle(folder / "tokenizer.json", text)


def trained(example: Example) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The context and the ids of every trained run."""
    runs, at = [], 0
    for label, group in groupby(example.labels, lambda label: label != IGNORED):
        length = len(list(group))
        if label:
            runs.append((tuple(example.ids[:at]), tuple(example.ids[at : at + length])))
        at += length
    return runs


def compare(found: Dataset, rows: list[Any], oracle: Oracle, **variables: Any) -> int:
    """Each trained turn of each row is in exactly one sample, in its served context.

    A row with a turn that serving cannot produce is refused by that turn.
    """
    refused = {entry["row"]: entry["field"] for entry in found.rejects.entries()}
    by_row = {row: list(some) for row, some in groupby(found.train, lambda e: e.row)}
    turns = 0
    for number, row in enumerate(rows, 1):
        if (turn := oracle.unserved(row, **variables)) is not None:
            assert refused.pop(number) == f"messages[{turn}]", json.dumps(row)
            continue
        served = oracle.turns(row, **variables)
        wanted = {(t.prompt, t.reply) for t in served}
        got = [run for example in by_row[number] for run in trained(example)]
        assert len(got) == len(set(got)), json.dumps(row)
        assert set(got) == wanted, json.dumps(row)
        if "enable_thinking" not in variables:  # no prompt ends within a token of its rendering
            given = [(t.index, {"enable_thinking": t.thinking, **variables}) for t in served]
            whole = {oracle.template_ids(row, index + 1, **more) for index, more in given}
            assert {tuple(example.ids) for example in by_row[number]} <= whole, json.dumps(row)
        turns += len(wanted)
    assert found.turns == turns
    assert not refused
    return turns


@pytest.mark.parametrize("sku", fast(SKUS, "3.5", "3.6"))
def test_what_is_trained_is_what_serving_produces(
    shared: Path, tmp_path: Path, sku: str, tokenizer: Tokenizer
) -> None:
    rng = random.Random(sku)
    rows = [conversation(rng) for _ in range(12)]
    found, oracle = encoded(shared, tmp_path, sku, rows, tokenizer)
    assert compare(found, rows, oracle) > 15
    assert found.samples > found.rows


@pytest.mark.slow
@pytest.mark.parametrize("sku", SKUS)
def test_five_hundred_conversations(
    shared: Path, tmp_path: Path, sku: str, tokenizer: Tokenizer
) -> None:
    rng = random.Random(f"slow {sku}")
    rows = [conversation(rng) for _ in range(500)]
    found, oracle = encoded(shared, tmp_path, sku, rows, tokenizer)
    assert compare(found, rows, oracle) > 1000


@pytest.mark.slow
def test_preserved_thinking_shares_samples(
    shared: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rng = random.Random(36)
    rows = [conversation(rng) for _ in range(200)]
    found, oracle = encoded(shared, tmp_path, "3.6", rows, tokenizer, preserve_thinking=True)
    compare(found, rows, oracle, preserve_thinking=True)
    split, _ = encoded(shared, tmp_path, "3.6", rows, tokenizer)
    assert found.samples < split.samples


PLAIN = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SKIP = Policies(bad_rows="skip", bad_rows_limit=1.0)


@pytest.mark.parametrize("thinking", fast([True, False]))
def test_a_mode_that_the_user_fixed(
    shared: Path, tmp_path: Path, thinking: bool, tokenizer: Tokenizer
) -> None:
    fixed_mode(shared, tmp_path, "3.6", thinking, tokenizer, 12)


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("sku", SKUS)
def test_a_hundred_conversations_in_a_fixed_mode(
    shared: Path, tmp_path: Path, sku: str, thinking: bool, tokenizer: Tokenizer
) -> None:
    assert fixed_mode(shared, tmp_path, sku, thinking, tokenizer, 125) > 20


def fixed_mode(
    shared: Path, tmp_path: Path, sku: str, thinking: bool, tokenizer: Tokenizer, count: int
) -> int:
    """Rows with and without reasoning in one mode: by the user, and by each row."""
    rng = random.Random(f"fixed {sku} {thinking}")
    rows: list[Any] = [PLAIN, *(conversation(rng) for _ in range(count))]
    mode = {"enable_thinking": thinking}
    found, oracle = encoded(shared, tmp_path, sku, rows, tokenizer, SKIP, **mode)
    turns = compare(found, rows, oracle, **mode)
    if thinking:  # a turn without reasoning closes the block itself
        assert found.rejects.count == 0
    else:
        assert 0 < found.rejects.count <= count
    own = [{**row, "chat_template_kwargs": mode} for row in rows]
    found, oracle = encoded(shared, tmp_path, sku, own, tokenizer, SKIP)
    assert compare(found, own, oracle, **mode) == turns
    return turns


def test_the_oracle_could_fail(shared: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows: list[Any] = [PLAIN]
    found, oracle = encoded(shared, tmp_path, "3.5", rows, tokenizer)
    (turn,) = oracle.turns(rows[0])
    assert trained(found.train[0]) == [(turn.prompt, turn.reply)]
    other = Served(1, False, turn.prompt[:-1], turn.reply)
    assert (other.prompt, other.reply) not in trained(found.train[0])
    assert FORMAT.assistant == QWEN35.assistant
