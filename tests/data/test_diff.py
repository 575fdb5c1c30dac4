"""Differences between two models: their kind, and where they begin."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from support.chat_kit import own_tokenizer

from qcore.data.rendering.masking import IGNORED, Example
from qcore.data.rendering.samples import Span
from qcore.data.rows import ChatRow
from qcore.data.views.diff import differences
from qcore.data.views.show import ShownSample

TOKENIZER = own_tokenizer()


def sample(row: int, text: str, number: int = 1, **facts: Any) -> ShownSample:
    ids = facts.pop("ids", None) or TOKENIZER.encode(text, add_special_tokens=False).ids
    spans = (Span(start=0, end=len(ids), why=facts.pop("why", "answer"), trained=True),)
    trained = facts.pop("trained", [True] * len(ids))
    labels = [id_ if on else IGNORED for id_, on in zip(ids, trained, strict=True)]
    example = Example(
        ids=array("i", ids), labels=array("i", labels), line=row, turns=1, supervised=len(ids),
        row=row, sample=number, token_spans=spans,
    )  # fmt: skip
    return ShownSample(origin=ChatRow(line=row, messages=(), path=Path("a")), example=example)


def kinds(a: list[ShownSample], b: list[ShownSample]) -> list[tuple[int, int, str, int]]:
    found = differences(a, b, (TOKENIZER, TOKENIZER))
    return [(one.row, one.sample, one.kind, one.token) for one in found]


def test_equal_samples_do_not_differ() -> None:
    assert (
        kinds([sample(1, "the user"), sample(2, "b")], [sample(1, "the user"), sample(2, "b")])
        == []
    )


def test_each_kind_of_difference_is_named() -> None:
    ids = TOKENIZER.encode("the user", add_special_tokens=False).ids
    split = [i for char in "the user" for i in TOKENIZER.encode(char, add_special_tokens=False).ids]
    assert split != ids
    a = [sample(1, "the user"), sample(2, "the user"), sample(3, "the user"), sample(4, "b"),
         sample(6, "c"), sample(6, "d", 2)]  # fmt: skip
    b = [
        sample(1, "the fox"),
        sample(2, "the user", ids=split),
        sample(3, "the user", trained=[True] * (len(ids) - 1) + [False]),
        sample(5, "b"),
        sample(6, "c"),
    ]
    found = kinds(a, b)
    assert [(row, number, kind) for row, number, kind, _ in found] == [
        (1, 1, "text"), (2, 1, "tokens"), (3, 1, "trained"), (4, 0, "refused"),
        (5, 0, "refused"), (6, 0, "samples"),
    ]  # fmt: skip
    assert found[2][3] == len(ids) - 1
