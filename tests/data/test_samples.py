"""Samples: which turns are trained, in which context, and why each character is or is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import (
    FORMAT,
    TEMPLATE,
    FakeCheckpoint,
    bot,
    own_template,
    own_tokenizer,
    user,
    write_rows,
)

from qcore.api.media import RowError
from qcore.checkpoint.chat_template import Template
from qcore.data.dataset import Dataset, dataset
from qcore.data.policies import Policies
from qcore.data.rejects import Rejects
from qcore.data.rendering.masking import IGNORED, Example
from qcore.data.rendering.renderer import Options, Renderer
from qcore.data.rows import RowCheck
from qcore.data.sources.source import Source
from qcore.errors import InputError

END = "<|im_end|>"
#: The own template with a mode of thinking, as Qwen 3.5 has it.
SWITCHED = TEMPLATE.replace(
    "{{- '<|im_start|>assistant\\n<think>\\n' }}{% endif %}",
    "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{- '\\n</think>\\n\\n' }}"
    "{% endif %}{% endif %}",
)
THINKING = replace(FORMAT, thinking_switch="enable_thinking")
TALK = [user("2+2?"), bot("4", reasoning_content="pair"), user("+3?"), bot("7", thinking="sum")]
MIXED = [user("hi"), bot("ho"), user("2+2?"), bot("4", reasoning_content="pair")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    own_tokenizer().save(str(made / "tokenizer.json"))
    return made


def load(
    folder: Path, tmp_path: Path, *rows: Any, template: str = SWITCHED, limit: int = 1000,
    variables: Any = None, **policies: Any,
) -> Dataset:  # fmt: skip
    given = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    checkpoint: Any = FakeCheckpoint(folder, own_template(template))
    return dataset(
        write_rows(tmp_path / "rows.jsonl", given), checkpoint, THINKING, limit,
        policies=Policies(**policies), variables=variables,
    )  # fmt: skip


def shown(example: Example) -> str:
    """The text of a sample, with what is trained between brackets."""
    tokenizer, text, inside = own_tokenizer(), "", False
    runs: list[tuple[bool, list[int]]] = []
    for id_, label in zip(example.ids, example.labels, strict=True):
        inside = label != IGNORED
        if not runs or runs[-1][0] != inside:
            runs.append((inside, []))
        runs[-1][1].append(id_)
    for trained, ids in runs:
        said = tokenizer.decode(ids, skip_special_tokens=False)
        text += f"[{said}]" if trained else said
    return text.replace("<|im_start|>", "").replace(END, "#").replace("\n", "/")


def test_a_turn_is_trained_in_the_context_that_serving_gives_it(
    folder: Path, tmp_path: Path
) -> None:
    found = load(folder, tmp_path, TALK)
    assert [shown(example) for example in found.train] == [
        "user/2+2?#/assistant/<think>/[pair/</think>//4#]/",
        "user/2+2?#/assistant/4#/user/+3?#/assistant/<think>/[sum/</think>//7#]/",
    ]
    assert found.train_sizes == (2,)
    assert found.chat.as_json()["kwargs"] == {"enable_thinking": True}


def test_one_rendering_on_demand_says_what_is_lost(folder: Path, tmp_path: Path) -> None:
    found = load(folder, tmp_path, TALK, MIXED, history="as_rendered")
    assert shown(found.train[0]) == (
        "user/2+2?#/assistant/[4#]/user/+3?#/assistant/<think>/[sum/</think>//7#]/"
    )
    lost = [f for f in found.findings if f.code == "QC-DATA-043"]
    assert [(f.row, f.field) for f in lost] == [(1, "messages[1].reasoning_content")]
    (line,) = (line for line in found.findings.lines() if "QC-DATA-043" in line)
    assert "1 of 3 reasonings (" in line
    # `keep_thinking` is named because a probe kept the reasoning with it.
    assert "history=as_served or chat_template_kwargs.keep_thinking=true" in line


def test_turns_whose_context_is_kept_share_a_sample(folder: Path, tmp_path: Path) -> None:
    found = load(folder, tmp_path, TALK, variables={"keep_thinking": True})
    assert [shown(example) for example in found.train] == [
        "user/2+2?#/assistant/<think>/[pair/</think>//4#]/user/+3?#/assistant/<think>/"
        "[sum/</think>//7#]/"
    ]
    assert not [f for f in found.findings if f.code in ("QC-DATA-043", "QC-DATA-048")]


def test_the_mode_of_thinking_is_each_turns_own(folder: Path, tmp_path: Path) -> None:
    found = load(folder, tmp_path, MIXED)
    assert [shown(example) for example in found.train] == [
        "user/hi#/assistant/<think>//</think>//[ho#]/",
        "user/hi#/assistant/ho#/user/2+2?#/assistant/<think>/[pair/</think>//4#]/",
    ]
    record = found.chat.as_json()
    assert record["kwargs"] == {}
    assert (record["turns_with_reasoning"], record["turns_without"]) == (1, 1)
    assert any("the adapter keeps the template's default" in line for line in found.lines())


def test_turns_without_reasoning_record_the_mode(folder: Path, tmp_path: Path) -> None:
    found = load(folder, tmp_path, [user("a"), bot("b")], [user("c"), bot("d")])
    assert found.chat.as_json()["kwargs"] == {"enable_thinking": False}
    assert any("0 of 2 trained turns have reasoning" in line for line in found.lines())
    assert any("enable_thinking=false" in line for line in found.lines())


def test_the_users_own_mode_is_honored_and_said(folder: Path, tmp_path: Path) -> None:
    found = load(folder, tmp_path, [user("a"), bot("b")], variables={"enable_thinking": True})
    assert found.chat.as_json()["kwargs"] == {"enable_thinking": True}
    assert any("enable_thinking=true as you set it" in line for line in found.lines())
    # Serving opens the block, and the model has to close it.
    assert shown(found.train[0]) == "user/a#/assistant/<think>/[/</think>//b#]/"
    assert not [f for f in found.findings if f.code == "QC-DATA-042"]


OFF = {"enable_thinking": False}
REASONED = [user("2+2?"), bot("4", reasoning_content="pair")]


@pytest.mark.parametrize(
    ("row", "variables", "where"),
    [
        (REASONED, OFF, "the setting chat_template_kwargs"),
        ({"messages": REASONED, "chat_template_kwargs": OFF}, {}, "the row's chat_template_kwargs"),
    ],
)
def test_reasoning_after_a_prompt_without_thinking_is_refused(
    folder: Path, tmp_path: Path, row: Any, variables: Any, where: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(folder, tmp_path, row, variables=variables)
    error = caught.value
    assert (error.code, error.field) == ("QC-DATA-041", "line 1, messages[1]")
    assert "in another mode of thinking" in error.what
    assert "</think>" in str(error.expected)
    assert f"leave enable_thinking out of {where}" in str(error.fix)
    assert "reasoning=drop" in str(error.fix)
    # Each of the three ways works.
    dropped = load(folder, tmp_path, row, variables=variables, reasoning="drop")
    assert shown(dropped.train[0]) == "user/2+2?#/assistant/<think>//</think>//[4#]/"
    own = load(folder, tmp_path, REASONED)
    assert shown(own.train[0]) == "user/2+2?#/assistant/<think>/[pair/</think>//4#]/"
    load(folder, tmp_path, row, variables=variables, history="as_rendered")


def test_a_template_with_one_mode_of_thinking(folder: Path, tmp_path: Path) -> None:
    """The own template always opens thinking; a variant of it never does."""
    plain = [user("a"), bot("b")]
    found = load(folder, tmp_path, plain, REASONED, template=TEMPLATE)
    assert [shown(example) for example in found.train] == [
        "user/a#/assistant/<think>/[/</think>//b#]/",
        "user/2+2?#/assistant/<think>/[pair/</think>//4#]/",
    ]
    bare = TEMPLATE.replace("assistant\\n<think>\\n' }}{% endif %}", "assistant\\n' }}{% endif %}")
    found = load(folder, tmp_path, plain, REASONED, template=bare)
    assert [shown(example) for example in found.train] == [
        "user/a#/assistant/[<think>//</think>//b#]/",
        "user/2+2?#/assistant/[<think>/pair/</think>//4#]/",
    ]
    closed = TEMPLATE.replace(
        "assistant\\n<think>\\n' }}{%", "assistant\\n<think>\\n\\n</think>\\n\\n' }}{%"
    )
    with pytest.raises(InputError) as caught:
        load(folder, tmp_path, REASONED, template=closed)
    assert caught.value.code == "QC-DATA-041"
    assert str(caught.value.fix).startswith("set history=as_rendered")


def test_prompts_within_a_token_of_the_rendering_do_not_share_a_sample(
    folder: Path, tmp_path: Path
) -> None:
    """A think block that a turn closes itself is other tokens in the history of the next turn."""
    rows = [user("a"), bot("b"), user("c"), bot("d")]
    fixed = {"keep_thinking": True, "enable_thinking": True}
    assert load(folder, tmp_path, TALK, variables=fixed).samples == 1
    found = load(folder, tmp_path, rows, variables=fixed)
    assert [shown(example) for example in found.train] == [
        "user/a#/assistant/<think>/[/</think>//b#]/",
        "user/a#/assistant/<think>//</think>//b#/user/c#/assistant/<think>/[/</think>//d#]/",
    ]
    tokenizer = own_tokenizer()
    for example in found.train:
        start = next(n for n, label in enumerate(example.labels) if label != IGNORED)
        text = tokenizer.decode(list(example.ids[:start]), skip_special_tokens=False)
        assert list(example.ids[:start]) == tokenizer.encode(text).ids


def test_turns_that_one_rendering_trains_after_another_prompt_are_counted(
    folder: Path, tmp_path: Path
) -> None:
    """The header of an earlier turn is bare, and the mode is that of the last turn for all."""
    found = load(folder, tmp_path, TALK, MIXED, REASONED, history="as_rendered")
    counted = [(f.row, f.field) for f in found.findings if f.code == "QC-DATA-042"]
    assert counted == [(1, "messages[1]"), (2, "messages[1]")]
    (line,) = (line for line in found.lines() if "QC-DATA-042" in line)
    assert "2 of 5 trained turns are trained after another prompt than serving shows" in line
    assert "Fix: set history=as_served" in line
    kept = load(folder, tmp_path, TALK, variables={"keep_thinking": True}, history="as_rendered")
    assert not [f for f in kept.findings if f.code == "QC-DATA-042"]
    # Reasoning that a fixed mode does not prompt for is trained as it is rendered, and counted.
    off = load(folder, tmp_path, REASONED, variables=OFF, history="as_rendered")
    assert [f.row for f in off.findings if f.code == "QC-DATA-042"] == [1]


def test_a_rows_own_variables_are_used_and_checked(folder: Path, tmp_path: Path) -> None:
    kept = {"messages": TALK, "chat_template_kwargs": {"keep_thinking": True}}
    found = load(folder, tmp_path, kept, TALK)
    assert found.train_sizes == (1, 2)
    assert load(folder, tmp_path, kept).chat.as_json()["kwargs"] == {
        "keep_thinking": True, "enable_thinking": True,
    }  # fmt: skip
    for name, says in (("keep_thinkin", "did you mean keep_thinking?"), ("tools", "leave it out")):
        wrong = {"messages": TALK, "chat_template_kwargs": {name: True}}
        with pytest.raises(InputError) as caught:
            load(folder, tmp_path, wrong)
        assert caught.value.code == "QC-DATA-049"
        assert says in str(caught.value.fix)


def test_variables_are_recorded_from_trained_rows_only(folder: Path, tmp_path: Path) -> None:
    """An evaluated, a dropped and a refused row without them change nothing."""
    kept = {"messages": TALK, "chat_template_kwargs": {"keep_thinking": True}}
    long = {"messages": [user("q"), bot("word " * 400)]}
    paths = [
        write_rows(tmp_path / name, rows)
        for name, rows in (
            ("train", [kept, kept, long, {"messages": [user("q")]}]),
            ("eval", [{"messages": MIXED}]),
        )
    ]
    train, held = (Source(name=path.name, files=(path,)) for path in paths)
    checkpoint: Any = FakeCheckpoint(folder, own_template(SWITCHED))
    found = dataset(
        [train], checkpoint, THINKING, 200, eval_data=[held],
        policies=Policies(long_rows="drop", bad_rows="skip", bad_rows_limit=0.5),
    )  # fmt: skip
    assert (found.dropped, found.rejects.count, len(found.eval)) == (1, 1, 2)
    assert found.chat.as_json()["kwargs"] == {"keep_thinking": True, "enable_thinking": True}


def test_variables_that_differ_between_trained_rows_are_named(folder: Path, tmp_path: Path) -> None:
    kept = {"messages": TALK, "chat_template_kwargs": {"keep_thinking": True}}
    found = load(folder, tmp_path, kept, kept, TALK)
    assert found.chat.as_json()["kwargs"] == {"enable_thinking": True}
    (line,) = (line for line in found.lines() if "keep_thinking" in line)
    assert line.startswith("warning: QC-DATA-045: keep_thinking differs between the trained rows")
    assert "(true in 2, unset in 1)" in line
    # The user's own value is that of the rows without one.
    same = load(folder, tmp_path, kept, TALK, variables={"keep_thinking": True})
    assert same.chat.as_json()["kwargs"] == {"keep_thinking": True, "enable_thinking": True}
    assert not any("differs" in line for line in same.lines())


A, B = bot("one"), bot("two")


@pytest.mark.parametrize(
    ("row", "policies", "wanted"),
    [
        ([user("q"), A, user("r"), B], {}, ["one#", "two#"]),
        ([user("q"), A, user("r"), B], {"turns": "last"}, ["two#"]),
        ([user("q"), A | {"train": False}, user("r"), B], {}, ["two#"]),
        ([user("q"), A | {"train": True}, user("r"), B], {"turns": "last"}, ["one#", "two#"]),
        ([user("q"), A, user("r"), B | {"train": False}], {}, ["one#"]),
        ({"messages": [user("q"), A | {"train": True}, user("r"), B], "train": False}, {},
         ["one#"]),
        ({"messages": [user("q"), A, user("r"), B], "train": True}, {"train": False},
         ["one#", "two#"]),
        ([user("q"), A | {"train": True}, user("r"), B], {"train": False}, ["one#"]),
        ([user("q") | {"train": False}, A], {}, ["one#"]),
        ([user("q"), A, user("r")], {}, ["one#"]),
    ],
)  # fmt: skip
def test_which_turns_are_trained(
    folder: Path, tmp_path: Path, row: Any, policies: dict[str, Any], wanted: list[str]
) -> None:
    given = row if isinstance(row, dict) else {"messages": row}
    path = write_rows(tmp_path / "rows.jsonl", [given])
    source = Source(name="rows", files=(path,), **policies)
    checkpoint: Any = FakeCheckpoint(folder, own_template(SWITCHED))
    found = dataset([source], checkpoint, THINKING, 1000)
    runs = [part.split("]")[0] for e in found.train for part in shown(e).split("[")[1:]]
    assert runs == wanted
    assert found.turns == len(wanted)
    assert all("train" not in shown(example) for example in found.train)


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ([user("q"), A | {"train": False}], "QC-DATA-012", ""),
        ({"messages": [user("q"), A], "train": False}, "QC-DATA-012", ""),
        ([user("q") | {"train": True}, A], "QC-DATA-022", "messages[0].train"),
        ([user("q"), A | {"train": 0.5}], "QC-DATA-022", "messages[1].train"),
        ({"messages": [user("q"), A], "chat_template_kwargs": [1]}, "QC-DATA-006",
         "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_marks_that_train_nothing_or_mean_nothing_are_refused(
    folder: Path, tmp_path: Path, row: Any, code: str, field: str
) -> None:
    with pytest.raises(InputError) as caught:
        load(folder, tmp_path, row)
    assert caught.value.code == code
    assert caught.value.field == (f"line 1, {field}" if field else "line 1")


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ({"messages": [user("q") | {"train": True}, A]}, "QC-DATA-006", "messages[0].train"),
        ({"messages": [user("q"), A | {"train": 1}]}, "QC-DATA-006", "messages[1].train"),
        ({"messages": [user("q"), A], "train": "yes"}, "QC-DATA-006", "train"),
        ({"messages": [user("q"), A], "chat_template_kwargs": []}, "QC-DATA-049",
         "chat_template_kwargs"),
    ],
)  # fmt: skip
def test_a_canonical_row_has_marks_of_true_and_false(row: Any, code: str, field: str) -> None:
    with pytest.raises(RowError) as caught:
        RowCheck(FORMAT)(1, row)
    assert (caught.value.code, caught.value.at) == (code, field)


@pytest.mark.parametrize(
    ("policy", "message", "wanted"),
    [
        ("train", bot("4", reasoning_content="pair"), "<think>/[pair/</think>//4#]/"),
        ("mask", bot("4", reasoning_content="pair"), "<think>/pair/</think>//[4#]/"),
        ("drop", bot("4", reasoning_content="pair"), "<think>//</think>//[4#]/"),
        ("drop", bot("4", thinking="pair"), "<think>//</think>//[4#]/"),
        ("mask", bot("4"), "<think>//</think>//[4#]/"),
    ],
)
def test_reasoning(folder: Path, tmp_path: Path, policy: str, message: Any, wanted: str) -> None:
    found = load(folder, tmp_path, [user("q"), message], reasoning=policy)
    assert shown(found.train[0]) == f"user/q#/assistant/{wanted}"
    mode = policy != "drop" and len(message) > 2
    assert found.chat.as_json()["kwargs"] == {"enable_thinking": mode}


def test_an_earlier_turn_that_cannot_be_served_is_refused_by_turn(
    folder: Path, tmp_path: Path
) -> None:
    picky = SWITCHED + "{% if messages | length == 2 %}{{ raise_exception('two') }}{% endif %}"
    checkpoint: Any = FakeCheckpoint(folder, own_template(picky))
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}])
    with pytest.raises(InputError) as caught:
        dataset(path, checkpoint, THINKING, 1000)
    assert (caught.value.code, caught.value.field) == ("QC-DATA-040", "line 1, messages[1]")
    assert "as_rendered" in str(caught.value.fix)
    marked = [TALK[0], TALK[1] | {"train": False}, *TALK[2:]]
    assert load(folder, tmp_path, marked, template=picky).samples == 1


def test_a_turn_that_serving_shows_in_another_context_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    secret = "{% if not add_generation_prompt and messages | length > 5 %}!{% endif %}" + SWITCHED
    long = [*TALK, user("q"), bot("a")]
    assert load(folder, tmp_path, TALK, template=secret).samples == 2
    with pytest.raises(InputError) as caught:
        load(folder, tmp_path, long, template=secret)
    assert (caught.value.code, caught.value.field) == ("QC-DATA-041", "line 1, messages[5]")


def test_every_character_has_a_reason(folder: Path) -> None:
    options = Options(explain=True, special={})
    rows = write_rows(folder / "explained.jsonl", [{"messages": [*MIXED, user("end")]}])
    rejects = Rejects()
    with Template(SWITCHED, "own.jinja") as template:
        renderer = Renderer(template, THINKING, own_tokenizer(), options, rejects)
        ((_, (first, last)),) = renderer.encoded([Source(name="r", files=(rows,))])
    for one in (first, last):
        ends = [span.end for span in one.char_spans]
        assert [span.start for span in one.char_spans] == [0, *ends[:-1]]
        assert ends[-1] == len(one.text)
        tokens = one.example.token_spans
        assert [span.start for span in tokens] == [0, *(span.end for span in tokens[:-1])]
        assert tokens[-1].end == len(one.example.ids)
        for span in tokens:
            labels = one.example.labels[span.start : span.end]
            assert all((label != IGNORED) == span.trained for label in labels)
    assert [(span.why, span.trained) for span in last.char_spans] == [
        ("user turn", False),
        ("template", False),
        ("assistant turn, not trained: history, trained in sample 1", False),
        ("template", False),
        ("user turn", False),
        ("template", False),
        ("prompt", False),
        ("reasoning", True),
        ("answer", True),
        ("end of turn", True),
        ("template", False),
    ]


def test_whitespace_that_the_template_drops_is_counted(folder: Path, tmp_path: Path) -> None:
    found = load(folder, tmp_path, [user(" q "), bot("    return 1\n\n")], [user("q"), bot("a")])
    (finding,) = (f for f in found.findings if f.code == "QC-DATA-044")
    assert (finding.row, finding.field) == (1, "messages[1].content")
    assert "6 characters" in finding.message
    (line,) = (line for line in found.lines() if "QC-DATA-044" in line)
    assert "1 of 2 trained turns" in line


def test_whitespace_after_a_think_block_is_counted(folder: Path, tmp_path: Path) -> None:
    found = load(folder, tmp_path, [user("q"), bot("<think>\nr\n</think>\n\n    return 1\n\n")])
    (finding,) = (f for f in found.findings if f.code == "QC-DATA-044")
    assert finding.field == "messages[1].content"


def test_the_factor_is_reported_before_the_run(folder: Path, tmp_path: Path) -> None:
    found = load(folder, tmp_path, TALK, TALK, [user("q"), bot("a")])
    longest = [max(len(e.ids) for e in found.train if e.row == n) for n in (1, 2, 3)]
    factor = sum(len(e.ids) for e in found.train) / sum(longest)
    (line,) = (line for line in found.lines() if "QC-DATA-048" in line)
    assert f"3 rows became 5 samples with {factor:.2f} times the tokens" in line
    assert "history=as_served" in line
    assert found.summary()["samples"] == 5
