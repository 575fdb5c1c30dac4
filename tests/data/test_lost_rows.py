"""What a source loses: refused, skipped, dropped and cut rows are counted, listed and bounded."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import FORMAT, FakeCheckpoint, bot, own_template, own_tokenizer, user
from support.chat_kit import write_rows as write

from qcore.data.dataset import Dataset, dataset
from qcore.data.policies import Policies
from qcore.data.rejects import Rejects
from qcore.data.rendering.renderer import Options, Renderer
from qcore.data.sources.source import Source
from qcore.data.views.check import CheckReport, check_rows
from qcore.errors import InputError, PreflightError

GOOD = {"messages": [user("q"), bot("a")]}
BAD = {"messages": [user("q")]}
LONG = {"messages": [user("q"), bot("word " * 50)]}
TALK = {"messages": [user("q"), bot("a"), user("r"), bot("word " * 50), user("s"), bot("b")]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    own_tokenizer().save(str(folder / "tokenizer.json"))
    return FakeCheckpoint(folder, own_template())


@pytest.fixture
def source(tmp_path: Path) -> Any:
    def made(name: str, *rows: Any, **more: Any) -> Source:
        return Source(name=name, files=(write(tmp_path / f"{name}.jsonl", rows),), **more)

    return made


def load(checkpoint: Any, *sources: Source, eval_data: Any = (), **policies: Any) -> Dataset:
    return dataset(
        sources, checkpoint, FORMAT, 60, eval_data=eval_data, policies=Policies(**policies)
    )


def check(*sources: Source, **policies: Any) -> CheckReport:
    chosen = Policies(**policies)
    with own_template() as template:
        options = Options(policies=chosen, max_length=60)
        renderer = Renderer(template, FORMAT, own_tokenizer(), options, Rejects(chosen))
        return check_rows(renderer, sources)


def test_losses_are_counted_by_source(checkpoint: Any, source: Any) -> None:
    one = source("one", *[GOOD] * 20, BAD, LONG)
    two = source("two", *[GOOD] * 10, LONG, TALK, long_rows="truncate_turns")
    held = source("held", *[GOOD] * 10, BAD)
    found = load(checkpoint, one, two, eval_data=[held], bad_rows="skip", long_rows="drop")
    summary = found.summary()
    keys = ("rows", "rejected_rows", "dropped_rows", "truncated_rows")
    counts = [[s[key] for key in keys] for s in (*summary["sources"], *summary["eval_sources"])]
    assert counts == [[22, 1, 1, 0], [12, 0, 1, 1], [11, 1, 0, 0]]
    lines = list(found.lines())
    assert "one: 22 rows, 1 refused, 1 too long and left out" in lines
    assert "two: 12 rows, 1 too long and left out, 1 cut" in lines
    assert "held: 11 rows, 1 refused, evaluated only" in lines


def test_a_source_without_a_row_that_is_left_is_an_error(checkpoint: Any, source: Any) -> None:
    good, lost = source("good", *[GOOD] * 30), source("lost", LONG, LONG)
    with pytest.raises(InputError) as caught:
        load(checkpoint, good, lost, long_rows="drop")
    error = caught.value
    assert (error.code, error.file) == ("QC-DATA-015", str(lost.files[0]))
    assert "2 rows, 0 refused, 2 too long" in error.message


def test_evaluation_data_without_a_row_that_is_left_is_an_error(
    checkpoint: Any, source: Any
) -> None:
    good, held = source("good", *[GOOD] * 30), source("held", BAD)
    with pytest.raises(InputError) as caught:
        load(checkpoint, good, eval_data=[held], bad_rows="skip", bad_rows_limit=1.0)
    assert (caught.value.code, caught.value.file) == ("QC-DATA-015", str(held.files[0]))


def test_the_limit_holds_for_each_source(checkpoint: Any, source: Any) -> None:
    large, small = source("large", *[GOOD] * 90), source("small", *[GOOD] * 6, *[BAD] * 4)
    with pytest.raises(InputError) as caught:
        load(checkpoint, large, small, bad_rows="skip")
    error = caught.value
    assert (error.code, error.file) == ("QC-DATA-047", str(small.files[0]))
    assert "4 of 10 rows of the source" in error.message
    assert error.field == "line 7, the first of them"
    loose = source("small", *[GOOD] * 6, *[BAD] * 4, bad_rows_limit=0.5)
    assert load(checkpoint, large, loose, bad_rows="skip").rejects.count == 4


def test_two_sources_that_lose_too_many_are_two_errors(checkpoint: Any, source: Any) -> None:
    with pytest.raises(PreflightError) as caught:
        load(checkpoint, source("a", GOOD, BAD), source("b", GOOD, BAD), bad_rows="skip")
    assert [error.code for error in caught.value.errors] == ["QC-DATA-047"] * 2


def test_rows_that_are_dropped_or_cut_are_listed(
    checkpoint: Any, source: Any, tmp_path: Path
) -> None:
    one = source("one", GOOD, LONG, TALK, long_rows="truncate_turns")
    two = source("two", *[GOOD] * 9, LONG, BAD, long_rows="drop", bad_rows="skip")
    found = load(checkpoint, one, two)
    assert found.rejects.listed == 4
    found.rejects.write(tmp_path / "rejected.jsonl")
    listed = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    by_row = sorted((entry["row"], entry["code"], entry["action"]) for entry in listed)
    assert by_row == [
        (2, "QC-DATA-046", "dropped"),  # nothing trained of it fits
        (3, "QC-DATA-046", "cut"),
        (13, "QC-DATA-046", "dropped"),
        (14, "QC-DATA-010", "skipped"),
    ]
    assert "tokens, expected at most 60" in next(e["reason"] for e in listed if e["row"] == 13)
    texts = "\n".join(found.lines())
    assert "1 of 14 rows are longer than max_length=60 and were left out (long_rows=drop)" in texts
    assert "left out (long_rows=truncate_turns)" in texts
    assert "were cut (long_rows=truncate_turns)" in texts
    assert "rejected.jsonl lists them" in texts


def test_a_refused_row_is_listed_as_refused(checkpoint: Any, source: Any) -> None:
    seen: list[Rejects] = []
    with pytest.raises(InputError):
        dataset([source("one", GOOD, LONG)], checkpoint, FORMAT, 60, refused=seen.append)
    (entry,) = seen[0].entries()
    assert (entry["code"], entry["action"]) == ("QC-DATA-011", "refused")
    assert "which fits every row" in entry["fix"]


def test_severity_follows_the_policy_of_the_source(source: Any) -> None:
    strict = source("strict", *[GOOD] * 10, BAD)
    loose = source("loose", *[GOOD] * 10, BAD, LONG, bad_rows="skip", long_rows="drop")
    report = check(strict, loose)
    codes = ("QC-DATA-010", "QC-DATA-046")
    found = [(f.row, f.code, f.severity) for f in report.findings() if f.row and f.code in codes]
    assert found == [
        (11, "QC-DATA-010", "error"),
        (22, "QC-DATA-010", "warning"),
        (23, "QC-DATA-046", "warning"),
    ]
    lines = [line for line in report.lines if line.rows and line.code in codes]
    assert [(line.code, line.severity, line.rows) for line in lines] == [
        ("QC-DATA-010", "error", (11,)),
        ("QC-DATA-010", "warning", (22,)),
        ("QC-DATA-046", "warning", (23,)),
    ]


def test_a_check_does_not_name_a_list_that_it_does_not_write(source: Any) -> None:
    skipped = check(source("one", *[GOOD] * 30, BAD), bad_rows="skip")
    many = check(source("one", GOOD, *[BAD] * 40))
    said = [finding.message + finding.fix for finding in (*skipped.findings(), *many.findings())]
    assert isinstance(many.error, PreflightError)
    said += [str(error) for error in many.error.errors]
    assert not any("rejected.jsonl" in text for text in said)
    assert any("bad_rows=skip" in text for text in said)


@pytest.mark.slow
def test_a_report_on_many_bad_rows_is_as_small_as_one_on_few(tmp_path: Path) -> None:
    def held(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        line = json.dumps({"messages": [{"role": "oracle", "content": "x"}]}) + "\n"
        path.write_text(line * count)
        tracemalloc.start()
        report = check(Source(name="bad", files=(path,)))
        assert sum(1 for _ in report.findings()) >= count
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    held(100)  # fills caches
    assert held(4_000) < held(400) + (32 << 10)


def test_findings_can_refuse_rows(checkpoint: Any, source: Any) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    undeclared = {"messages": [user("q"), bot("a") | {"tool_calls": [call]}]}
    rows = source("one", *[GOOD] * 20, undeclared)
    assert load(checkpoint, rows).rejects.count == 0
    found = load(checkpoint, rows, refuse_findings=("QC-DATA-057",), bad_rows="skip")
    ((row, code),) = [(entry["row"], entry["code"]) for entry in found.rejects.entries()]
    assert (row, code) == (21, "QC-DATA-057")
