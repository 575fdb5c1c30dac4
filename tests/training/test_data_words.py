"""Several files, files that are only evaluated, refused rows: what a run does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.chat_kit import bot, user, write_rows
from support.cli_kit import here
from support.e2e_kit import tiny_folder
from support.run_kit import SHORT, start
from support.sinks import Heard

from qcore.errors import InputError, PreflightError, UsageError
from qcore.io.artifact import read_manifest

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [{"messages": [user(f"Item {n}?"), bot(f"Box {n}.")]} for n in range(4)]
TALK = {
    "messages": [
        user("2+2?"), bot("4", reasoning_content="Two pairs."),
        user("+3?"), bot("7", reasoning_content="Four and three."),
    ]
}  # fmt: skip
BAD = {"messages": [user("q")]}


def test_several_files_and_one_that_is_only_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, held = (
        write_rows(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("one", ROWS[:2]), ("two", [*ROWS[2:], TALK]), ("held", ROWS[:1]))
    )
    sets = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    ended = here(
        capsys, "train", "--model", tiny_folder(), "--data", one, "--data", two,
        "--eval-data", held, "--output", tmp_path / "out", "--device", "cpu", "--json", *sets,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.json["eval_loss"] is not None
    assert ended.json["steps"] == 3  # six samples of five rows, two a step
    meta = read_manifest(tmp_path / "out").meta
    data = meta["data"]
    assert [source["rows"] for source in data["sources"]] == [2, 3]
    assert (data["train_rows"], data["eval_rows"], data["samples"]) == (5, 1, 7)
    assert meta["chat"]["kwargs"] == {}
    assert (meta["chat"]["turns_with_reasoning"], meta["chat"]["turns_without"]) == (2, 4)


@pytest.mark.parametrize(
    ("settings", "eval_data", "field"),
    [({"eval_steps": 2}, (), "eval_steps"), ({"eval_fraction": 0.5}, ("e",), "eval_fraction")],
)
def test_evaluation_without_rows_or_with_two_kinds_is_refused(
    tmp_path: Path, settings: dict[str, Any], eval_data: tuple[str, ...], field: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UsageError) as caught:
        start(
            tiny_folder(), rows, tmp_path / "out", SHORT | settings,
            eval_data=[write_rows(tmp_path / name, ROWS) for name in eval_data],
        )  # fmt: skip
    assert (caught.value.code, caught.value.field) == ("QC-CONFIG-007", field)


def test_refused_rows_are_listed_in_the_run_folder_if_not_all_are_shown(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, BAD])
    with pytest.raises(InputError, match="no assistant turn"):
        start(tiny_folder(), rows, tmp_path / "out", SHORT)
    assert not (tmp_path / "out.run").exists()
    write_rows(rows, [*ROWS, *[BAD] * 25])
    with pytest.raises(PreflightError):
        start(tiny_folder(), rows, tmp_path / "out", SHORT)
    entries = (tmp_path / "out.run" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(entry)["line"] for entry in entries] == list(range(5, 30))
    assert not (tmp_path / "out").exists()


def test_skipped_rows_are_said_and_listed_beside_the_result(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, BAD])
    heard = Heard()
    more = {"bad_rows": "skip", "bad_rows_limit": 0.2, "max_steps": 1}
    start(tiny_folder(), rows, tmp_path / "out", SHORT | more, reporter=heard.reporter)
    assert any("1 of 5 rows are bad and were left out" in line for line in heard.notes)
    assert any("0 of 4 trained turns have reasoning" in line for line in heard.notes)
    (entry,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(entry)["code"] == "QC-DATA-010"
    meta = read_manifest(tmp_path / "out").meta
    assert meta["data"]["rejected_rows"] == 1
    assert meta["chat"]["turns_without"] == 4
    assert {finding["code"] for finding in meta["data"]["findings"]} >= {"QC-DATA-045"}
