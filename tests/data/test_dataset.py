"""A data file whole: counts, digest, split, and all bad rows at once."""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import (  # fmt: skip
    FORMAT,
    FakeCheckpoint,
    bot,
    call,
    encode_row,
    own_template,
    own_tokenizer,
    user,
    write_rows,
)

from qcore.data.dataset import Dataset, dataset, special_tokens
from qcore.data.policies import Policies
from qcore.data.rows import ChatRow
from qcore.errors import InputError, PreflightError

END = "<|im_end|>"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FakeCheckpoint:
    folder = tmp_path_factory.mktemp("model")
    own_tokenizer().save(str(folder / "tokenizer.json"))
    return FakeCheckpoint(folder, own_template())


def load(path: Path, checkpoint: Any, max_length: int = 1000, **more: Any) -> Dataset:
    return dataset(path, checkpoint, FORMAT, max_length, **more)


def rows(count: int) -> list[Any]:
    return [
        {"messages": [user(f"question {n}"), bot(f"answer {n}"), user("more"), bot("x" * n + ".")]}
        for n in range(count)
    ]


def test_counts_digest_and_arrays(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows(30))
    found = load(path, checkpoint)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.rows, found.turns) == (30, 60)
    assert found.eval == ()
    # The own template drops the think block of the first turn, so each turn has its own sample.
    assert [(e.line, e.row, e.sample) for e in found.train] == [
        (n, n, sample) for n in range(1, 31) for sample in (1, 2)
    ]
    assert (found.samples, found.train_sizes) == (60, (2,) * 30)
    assert all(isinstance(e.ids, array) and e.ids.itemsize == 4 for e in found.train)
    assert found.tokens == sum(len(e.ids) for e in found.train)
    assert found.longest == max(len(e.ids) for e in found.train)
    assert found.supervised == sum(
        label != -100 for e in found.train for label in list(e.labels)[1:]
    )
    assert found.summary()["supervised_tokens"] == found.supervised
    json.dumps(found.summary())


def test_equals_row_by_row(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows(20))
    found = load(path, checkpoint, policies=Policies(history="as_rendered"))
    tokenizer = own_tokenizer()
    with own_template() as template:
        for given, example in zip(rows(20), found.train, strict=True):
            row = ChatRow(line=example.line, row=example.row, messages=tuple(given["messages"]))
            assert encode_row(row, template, tokenizer, FORMAT, 1000) == example


def test_split_is_fixed_by_seed_and_by_text_not_by_order(
    tmp_path: Path, checkpoint: FakeCheckpoint
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows(40))
    back = write_rows(tmp_path / "back.jsonl", rows(40)[::-1])

    def held(where: Path, seed: int) -> set[tuple[int, ...]]:
        found = load(where, checkpoint, eval_fraction=0.25, seed=seed)
        assert (len(found.train_sizes), len({e.row for e in found.eval})) == (30, 10)
        assert not {e.row for e in found.train} & {e.row for e in found.eval}
        return {tuple(e.ids) for e in found.eval}

    assert held(path, 1) == held(path, 1) == held(back, 1)
    assert held(path, 1) != held(path, 2)


def test_split_needs_rows_for_both(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows(1))
    with pytest.raises(InputError) as caught:
        load(path, checkpoint, eval_fraction=0.1)
    assert caught.value.code == "QC-DATA-015"


def test_all_bad_rows_of_every_kind_in_the_order_of_the_file(
    tmp_path: Path, checkpoint: FakeCheckpoint
) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl",
        [
            *rows(2),
            {"messages": [user("q"), {"role": "system", "content": "late"}, bot("a")]},
            {"messages": [user("q"), bot("word " * 500)]},
            {"messages": [user("q")]},
            *rows(1),
            {"messages": [user("q"), bot("<tts_pad>" + END)]},
        ],
    )
    with path.open("a", encoding="utf-8") as file:
        file.write("{\n")
    with pytest.raises(PreflightError) as caught:
        load(path, checkpoint, max_length=400)
    got = [(e.code, e.field, e.file) for e in caught.value.errors]
    assert got == [
        ("QC-DATA-051", "line 3, messages[1]", str(path)),
        ("QC-DATA-011", "line 4", str(path)),
        ("QC-DATA-010", "line 5, messages", str(path)),
        ("QC-DATA-008", "line 7, messages[1].content", str(path)),
        ("QC-DATA-004", "line 8", str(path)),
    ]
    assert "which the chat template refuses" in caught.value.errors[0].message


def test_rows_are_repaired_and_the_repairs_reported(
    tmp_path: Path, checkpoint: FakeCheckpoint
) -> None:
    given = [
        {"messages": [user("a"), user("b"), bot("c"), user("d")]},
        {"messages": [user(""), bot("x")]},
        {"messages": [user("a"), bot("x", tool_calls=[call("f", {})])]},
    ]
    found = load(write_rows(tmp_path / "rows.jsonl", given), checkpoint)
    repairs = [one for one in found.findings if one.code.startswith("QC-DATA-05")]
    assert [(one.code, one.severity, one.row, one.field) for one in repairs] == [
        ("QC-DATA-050", "note", 1, "messages[1]"),
        ("QC-DATA-052", "warning", 1, "messages[3]"),
        ("QC-DATA-056", "warning", 2, "messages[0].content"),
        ("QC-DATA-057", "warning", 3, "messages[1].tool_calls[0]"),
    ]


def test_a_mark_of_a_medium_in_text_is_refused(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [user("<image>Hi"), bot("x")]}])
    with pytest.raises(InputError) as caught:
        load(path, checkpoint)
    assert caught.value.code == "QC-DATA-055"


def test_special_tokens_of_the_tokenizer_are_refused_in_text(
    tmp_path: Path, checkpoint: FakeCheckpoint
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = own_tokenizer()
    tokenizer.add_special_tokens(["<|audio|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [user("a <|audio|>"), bot("a")]}])
    load(path, checkpoint)
    with pytest.raises(InputError) as caught:
        load(path, FakeCheckpoint(folder, own_template()))
    assert caught.value.code == "QC-DATA-008"


def test_tools_and_string_arguments(tmp_path: Path, checkpoint: FakeCheckpoint) -> None:
    called = bot(None, tool_calls=[call("find", '{"a": "é"}')])
    messages = [user("q"), called, {"role": "tool", "content": "r"}, bot("done")]
    tools = [{"type": "function", "function": {"name": "find"}}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages, "tools": tools}])
    tokenizer = own_tokenizer()
    # The prompt of every turn opens thinking, and a turn without reasoning closes it itself. In the
    # history the block is other tokens, so that the turns do not share a sample.
    first, second = load(path, checkpoint).train
    for example, text in ((first, '<tool_call>find{"a": "é"}</tool_call>'), (second, "done")):
        kept = [label for label in example.labels if label != -100]
        assert tokenizer.decode(kept, skip_special_tokens=False) == f"\n</think>\n\n{text}{END}"
        assert '"find"}' in tokenizer.decode(list(example.ids), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (None, "QC-PRE-001"),
        ("{{ raise_exception('never') }}", "QC-TEMPLATE-002"),
        ("{{ x", "QC-TEMPLATE-001"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
         "QC-TEMPLATE-004"),
        ("hello", "QC-MASK-003"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_cannot_do_it_is_one_error(
    tmp_path: Path, checkpoint: FakeCheckpoint, template: str | None, code: str
) -> None:
    made = None if template is None else own_template(template)
    path = write_rows(tmp_path / "rows.jsonl", rows(50))
    with pytest.raises(InputError) as caught:
        load(path, FakeCheckpoint(checkpoint.path, made))
    assert caught.value.code == code
    assert not isinstance(caught.value, PreflightError)


def test_named_tokens_reach_the_template() -> None:
    config = {"eos_token": {"content": "<e>"}, "bos_token": None, "pad_token": "<p>", "x_token": 1}
    assert special_tokens(config) == {"eos_token": "<e>", "pad_token": "<p>"}
