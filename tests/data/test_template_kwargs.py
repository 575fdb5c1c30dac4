"""Template variables: what may be set, what is recorded, and that a set one reaches the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import (
    FORMAT,
    FakeCheckpoint,
    bot,
    own_template,
    own_tokenizer,
    user,
    write_rows,
)

from qcore.checkpoint.chat_template import STANDARD_INPUTS, Template
from qcore.config.frozen_map import Entries
from qcore.config.resolve import parse_entries
from qcore.data.dataset import Dataset, dataset
from qcore.data.policies import Policies
from qcore.data.rendering.template_kwargs import check_variables, other_template, recorded_variables
from qcore.errors import InputError, UsageError

ROWS = [
    {"messages": [user("one"), bot("two", reasoning_content="early"), user("three"), bot("four")]}
]


def encoded(folder: Path, **variables: Any) -> tuple[Dataset, str]:
    own_tokenizer().save(str(folder / "tokenizer.json"))
    checkpoint: Any = FakeCheckpoint(folder, own_template())
    made = dataset(
        write_rows(folder / "rows.jsonl", ROWS),
        checkpoint,
        FORMAT,
        512,
        variables=Entries(variables),
        policies=Policies(history="as_rendered"),
    )
    return made, own_tokenizer().decode(list(made.train[0].ids), skip_special_tokens=False)


def test_a_variable_reaches_every_row(tmp_path: Path) -> None:
    plain, text = encoded(tmp_path)
    kept, with_reasoning = encoded(tmp_path, keep_thinking=True)
    assert "early" not in text
    assert "early" in with_reasoning
    assert kept.supervised > plain.supervised
    # The template asks whether it *is* true.
    assert encoded(tmp_path, keep_thinking="true")[1] == text


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("keep_thinkin", "QC-CONFIG-008", "did you mean keep_thinking?"),
        ("xyzzy", "QC-CONFIG-008", "leave it out"),
        ("strftime_now", "QC-CONFIG-008", "leave it out"),
        ("ns", "QC-CONFIG-008", "leave it out"),  # the template sets it itself
        ("messages", "QC-CONFIG-009", "leave it out"),
        ("tools", "QC-CONFIG-009", "leave it out"),
        ("add_generation_prompt", "QC-CONFIG-009", "leave it out"),
        ("documents", "QC-CONFIG-009", "leave it out"),
        ("bos_token", "QC-CONFIG-009", "leave it out"),
    ],
)
def test_a_variable_that_would_do_nothing_or_harm_is_refused(
    tmp_path: Path, name: str, code: str, word: str
) -> None:
    with pytest.raises(UsageError) as caught:
        encoded(tmp_path, **{name: True})
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert caught.value.field == f"chat_template_kwargs.{name}"
    assert word in str(caught.value.fix)
    if code == "QC-CONFIG-008":
        assert "expected keep_thinking" in caught.value.message


def test_nothing_set_asks_nothing() -> None:
    class Unread:
        source = "t"

    check_variables(Unread(), {})  # type: ignore[arg-type]  # would fail if it were read


def recorded(given: Any) -> Entries:
    return recorded_variables(
        {"identity": {"settings": {"chat_template_kwargs": given}}}, "adapter"
    )


def test_what_an_adapter_was_trained_with() -> None:
    assert recorded({"enable_thinking": False}) == Entries({"enable_thinking": False})
    for meta in ({}, {"identity": {}}, {"identity": {"settings": {}}}, {"identity": 3}):
        assert recorded_variables(meta, "adapter") == Entries()


def test_a_template_other_than_the_recorded_one_is_named() -> None:
    template = own_template()
    same, other = template.sha256, "0" * 64
    for meta in ({}, {"chat": {"template_sha256": same}}, {"identity": {"template": same}}):
        assert other_template(meta, template, "the adapter") == ""
    both = {"chat": {"template_sha256": other}, "identity": {"template": same}}
    for meta in (both, {"identity": {"template": other}}):
        warning = other_template(meta, template, "the adapter")
        assert warning.startswith("the adapter was trained under another chat template")
        assert same[:12] in warning
        assert "(none)" in other_template(meta, None, "the adapter")


@pytest.mark.parametrize("given", [None, [], "x", {"a": None}, {"a": [1]}, {"a-b": 1}, {"a": "\0"}])
def test_a_record_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(InputError) as caught:
        recorded(given)
    assert caught.value.code == "QC-ADAPTER-008"
    assert "adapter" in caught.value.message


def test_a_flag_of_its_own() -> None:
    flag = "--chat-template-kwargs"
    items = ["a=false", "b=3", "c = two words", 'd="3"']
    assert parse_entries("chat_template_kwargs", items, flag=flag) == Entries(
        {"a": False, "b": 3, "c": "two words", "d": "3"}
    )
    assert parse_entries("chat_template_kwargs", (), flag=flag) == Entries()
    for items, code in (
        (["a"], "QC-CONFIG-006"),
        (["a="], "QC-CONFIG-002"),
        (["a=no"], "QC-CONFIG-002"),
        (["a-b=1"], "QC-CONFIG-003"),
        (["a=1", "a=1"], "QC-CONFIG-005"),
    ):
        with pytest.raises(UsageError) as caught:
            parse_entries("chat_template_kwargs", items, flag=flag)
        assert caught.value.code == code
        assert flag in caught.value.message


def test_one_list_says_what_every_template_gets() -> None:
    """A switch is what a template reads beyond it, for detection, probes and settings alike."""
    text = "{{ messages }}{{ tools }}{{ cls_token }}{{ continue_final_message }}{{ mine }}"
    with Template(text, "own.jinja") as template:
        assert template.switches() == {"mine"}
        check_variables(template, {"mine": 1})
        for name in STANDARD_INPUTS:
            with pytest.raises(UsageError) as caught:
                check_variables(template, {name: 1})
            assert caught.value.code == "QC-CONFIG-009"
