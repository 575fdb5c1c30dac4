"""Bad rows of several files: which are shown, and the file that lists all of them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from qcore.data.problems import SHOWN, Problems
from qcore.errors import InputError, PreflightError, WriteError


def bad(file: str, line: int, at: str = "") -> InputError:
    field = f"line {line}, {at}" if at else f"line {line}"
    return InputError("QC-DATA-006", "has no role", file=file, field=field, found="x", fix="add it")


def test_errors_are_shown_in_the_order_of_files_and_lines() -> None:
    problems = Problems()
    for file, line in (("b", 9), ("a", 2), ("b", 1), ("a", 1)):
        problems.add(line, bad(file, line))
    with pytest.raises(PreflightError) as caught:
        problems.stop()
    places = [(error.file, error.field) for error in caught.value.errors]
    assert places == [("b", "line 1"), ("b", "line 9"), ("a", "line 1"), ("a", "line 2")]


def test_all_are_counted_and_written(tmp_path: Path) -> None:
    rejected = tmp_path / "rejected.jsonl"
    rejected.write_text("of an earlier run\n")
    with Problems(rejected=rejected) as problems:
        for line in range(1, 31):
            problems.add(line, bad("a", line, "messages[0]"))
        problems.add(7, bad("b", 7))
        assert problems.codes == {"QC-DATA-006": 31}
        shown = problems.first()
    assert len(shown) == SHOWN + 1
    assert "31 rows are bad, of which the first 20 are shown" in shown[-1].message
    assert "rejected.jsonl lists all" in shown[-1].message
    entries = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert len(entries) == 31
    assert entries[0] == {
        "line": 1,
        "file": "a",
        "code": "QC-DATA-006",
        "field": "messages[0]",
        "reason": "has no role: found x",
    }
    assert (entries[-1]["file"], entries[-1]["field"]) == ("b", "")


def test_a_run_without_bad_rows_leaves_no_file(tmp_path: Path) -> None:
    rejected = tmp_path / "rejected.jsonl"
    rejected.write_text("of an earlier run\n")
    Problems(rejected=rejected).stop()
    assert not rejected.exists()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    problems = Problems(rejected=tmp_path / "nowhere" / "rejected.jsonl")
    with pytest.raises(WriteError):
        problems.add(1, bad("a", 1))


@pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_any_number_of_rows_takes_constant_memory(count: int, tmp_path: Path) -> None:
    rejected = tmp_path / "rejected.jsonl"
    tracemalloc.start()
    problems = Problems(rejected=rejected)
    for line in range(1, count + 1):
        problems.add(line, bad("a", line))
    problems.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert problems.count == count
    with rejected.open() as file:
        assert sum(1 for _ in file) == count
