"""``qcore data``: what is printed of rows, and the exit status where rows are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.cli_kit import Ended, apart, here, modules_after
from tokenizers import Tokenizer

from qcore_qwen35.tiny import write

TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "pair"},
    {"role": "user", "content": "+3?"},
    {"role": "assistant", "content": "7"},
]
PLAIN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
BAD = [{"role": "usr", "content": "hi"}, {"role": "assistant", "content": "ho"}]
ENTRY = {"row", "sample", "source", "format", "token_ids", "trained", "spans"}
REPORT = {"rows", "samples", "rejected", "tokens", "supervised", "formats", "findings"}
FINDING = {"code", "severity", "row", "field", "message", "fix"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Config, tokenizer and template of a tiny checkpoint, without its weights."""
    folder = tmp_path_factory.mktemp("model")
    write(folder)
    (folder / "model.safetensors").unlink()
    return folder


def rows_file(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps({"messages": row}) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def show(capsys: pytest.CaptureFixture[str], model: Path, *words: object) -> Ended:
    return here(capsys, "data", "show", "--model", model, *words)


def check(capsys: pytest.CaptureFixture[str], model: Path, *words: object) -> Ended:
    return here(capsys, "data", "check", "--model", model, *words)


class TestShow:
    def test_an_entry_has_the_tokens_of_a_sample_and_why_each_is_trained(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        ended = show(capsys, model, rows_file(tmp_path, TALK, PLAIN), "--json")
        assert ended.code == 0, ended.err
        (first, second, third) = ended.json["rows"]
        assert set(ended.json) == {"rows"}
        assert all(set(entry) == ENTRY for entry in ended.json["rows"])
        assert [(e["row"], e["sample"]) for e in (first, second, third)] == [(1, 1), (1, 2), (2, 1)]
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        for entry, said in ((first, "pair\n</think>\n\n4"), (second, "7"), (third, "ho")):
            ids = [i for i, on in zip(entry["token_ids"], entry["trained"], strict=True) if on]
            assert tokenizer.decode(ids, skip_special_tokens=False) == said + "<|im_end|>"
            spans = entry["spans"]
            assert [span["start"] for span in spans[1:]] == [span["end"] for span in spans[:-1]]
            assert (spans[0]["start"], spans[-1]["end"]) == (0, len(entry["token_ids"]))
            assert all(set(span) == {"start", "end", "why"} for span in spans)

    def test_good_rows_are_printed_where_others_are_refused(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        path = rows_file(tmp_path, PLAIN, BAD, TALK)
        ended = show(capsys, model, path, "--json")
        assert ended.code == 65
        assert [entry["row"] for entry in ended.json["rows"]] == [1, 3, 3]
        assert f"{path}: line 2, messages[0].role" in ended.err
        skipped = show(
            capsys, model, path, "--json", "--set", "bad_rows=skip", "--set", "bad_rows_limit=0.5"
        )
        assert (skipped.code, skipped.json) == (0, ended.json)
        beyond = show(capsys, model, path, "--json", "--set", "bad_rows=skip")
        assert (beyond.code, beyond.json) == (65, ended.json)

    def test_a_row_is_shown_alone_and_text_is_searched(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        path = rows_file(tmp_path, PLAIN, BAD, TALK)
        alone = show(capsys, model, path, "--json", "--row", "3")
        assert alone.code == 0
        assert [entry["row"] for entry in alone.json["rows"]] == [3, 3]
        bad = show(capsys, model, path, "--json", "--row", "2")
        assert (bad.code, bad.json) == (65, {"rows": []})
        none = show(capsys, model, path, "--json", "--row", "4")
        assert (none.code, none.json) == (2, {"rows": []})
        assert "QC-CLI-008" in none.err
        found = show(capsys, model, path, "--json", "--search", "HO")
        assert [entry["row"] for entry in found.json["rows"]] == [1]

    def test_rows_of_several_files_are_numbered_over_all_of_them(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        one = rows_file(tmp_path, PLAIN, BAD, name="one.jsonl")
        two = rows_file(tmp_path, PLAIN, name="two.jsonl")
        ended = show(capsys, model, one, two, "--json")
        places = [(entry["row"], entry["source"]) for entry in ended.json["rows"]]
        assert places == [(1, str(one)), (3, str(two))]

    def test_a_pipe_gets_a_line_for_each_span_without_control_characters(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        row = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "a\x1b[2J\u202eb"},
        ]
        ended = show(capsys, model, rows_file(tmp_path, row))
        assert ended.code == 0
        assert "\x1b" not in ended.out
        assert "\u202e" not in ended.out
        assert 'answer: "a\\u001b[2J\\u202eb"' in ended.out
        (head, *lines) = ended.out.splitlines()
        assert head.startswith("row 1, sample 1: ")
        assert {line[:4] for line in lines} == {"  - ", "  + "}

    def test_settings_change_what_is_trained(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        path = rows_file(tmp_path, TALK)
        ended = show(capsys, model, path, "--json", "--set", "turns=last")
        (entry,) = ended.json["rows"]
        assert [s["why"] for s in entry["spans"] if "not trained" in s["why"]] == [
            "assistant turn, not trained: turns=last"
        ]
        long = show(capsys, model, path, "--json", "--set", "max_length=8")
        assert (long.code, long.json) == (65, {"rows": []})
        assert "QC-DATA-011" in long.err


class TestCheck:
    def test_the_report_counts_rows_and_lists_all_findings(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        path = rows_file(tmp_path, PLAIN, BAD, TALK, "{", BAD)
        shown = show(capsys, model, path, "--json").json["rows"]
        ended = check(capsys, model, path, "--json")
        report = ended.json
        assert ended.code == 65
        assert set(report) == REPORT
        assert all(set(finding) == FINDING for finding in report["findings"])
        assert (report["rows"], report["samples"], report["rejected"]) == (5, 3, 3)
        assert report["tokens"] == sum(len(entry["token_ids"]) for entry in shown)
        assert report["supervised"] == sum(sum(entry["trained"]) for entry in shown)
        assert sum(report["formats"].values()) == 2
        errors = [f for f in report["findings"] if f["severity"] == "error"]
        assert [(f["row"], f["code"]) for f in errors] == [
            (2, "QC-DATA-006"),
            (4, "QC-DATA-004"),
            (5, "QC-DATA-006"),
        ]
        assert errors[0]["field"] == "messages[0].role"
        assert errors[0]["fix"]

    def test_skipped_rows_are_warnings_and_the_status_is_0(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        path = rows_file(tmp_path, PLAIN, BAD)
        limit = ("--set", "bad_rows=skip", "--set", "bad_rows_limit=0.5")
        ended = check(capsys, model, path, "--json", *limit)
        assert ended.code == 0
        severities = {f["severity"] for f in ended.json["findings"] if f["row"] == 2}
        assert severities == {"warning"}

    def test_people_get_a_line_for_each_code(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        ended = check(capsys, model, rows_file(tmp_path, PLAIN, *[BAD] * 7))
        assert "rows        8, 7 of them refused" in ended.out
        (line,) = [line for line in ended.out.splitlines() if "QC-DATA-006" in line]
        assert "7" in line
        assert "2, 3, 4, 5, 6, ..." in line

    def test_only_refused_rows_leave_a_report(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        ended = check(capsys, model, rows_file(tmp_path, BAD), "--json")
        assert ended.code == 65
        assert (ended.json["samples"], ended.json["tokens"]) == (0, 0)

    def test_a_file_that_is_missing_is_one_error(
        self, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
    ) -> None:
        ended = check(capsys, model, tmp_path / "no.jsonl", "--json")
        assert ended.code == 65
        assert ended.json["error"]["code"].startswith("QC-DATA-")


def test_weights_may_be_absent_in_part_or_damaged(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}')
    (tmp_path / "model-1.safetensors").write_bytes(b"cut")
    ended = check(capsys, tmp_path, rows_file(tmp_path, PLAIN), "--json")
    assert (ended.code, ended.json["samples"]) == (0, 1)


def test_neither_torch_nor_transformers_is_imported(model: Path, tmp_path: Path) -> None:
    path = rows_file(tmp_path, PLAIN)
    ended, modules = modules_after("data", "check", path, "--model", model, "--json")
    assert ended.code == 0, ended.err
    assert not {"torch", "transformers", "peft"} & modules


def test_a_process_of_its_own_prints_one_object(model: Path, tmp_path: Path) -> None:
    ended = apart("data", "show", rows_file(tmp_path, PLAIN), "--model", model, "--json")
    assert (ended.code, len(ended.json["rows"])) == (0, 1)


def test_a_page_is_written_with_every_sample(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    ended = show(capsys, model, rows_file(tmp_path, TALK, BAD), "--html", page)
    assert ended.code == 65
    assert ended.out == f"{page}: 2 samples of 2 rows\n"
    assert "unknown role" in page.read_text(encoding="utf-8")
    other = show(capsys, model, rows_file(tmp_path, TALK), "--html", tmp_path / "rows.jsonl")
    other.error("QC-DATA-070")


def test_diff_lists_what_another_template_renders_otherwise(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    path = rows_file(tmp_path, PLAIN, TALK)
    both = ("data", "diff", path, "--model", model, "--model", model)
    assert here(capsys, *both, "--json").json["differences"] == []
    here(capsys, *both[:5]).error("QC-CLI-009")


def test_parity_counts_turns(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    path = rows_file(tmp_path, PLAIN, TALK)
    ended = here(capsys, "data", "parity", path, "--model", model, "--json")
    assert ended.code == 0
    assert ended.json == {
        "rows": 2, "turns": 3, "differing": 0, "differences": [], "notes": [],
    }  # fmt: skip
    spaced = rows_file(tmp_path, [PLAIN[0], {"role": "assistant", "content": "  ho"}])
    ended = here(capsys, "data", "parity", spaced, "--model", model, "--json")
    assert (ended.code, ended.json["differing"], ended.json["differences"]) == (0, 0, [])
    (found,) = ended.json["notes"]
    assert (found["row"], found["turn"], found["cause"]) == (1, 1, "the template trims whitespace")
    ended = here(capsys, "data", "parity", spaced, "--model", model)
    assert "Messages that are not trained as their row has them" in ended.out
    assert "row 1, messages[1].content" in ended.out
    path, rendered = rows_file(tmp_path, TALK), ("--set", "history=as_rendered")
    ended = here(capsys, "data", "parity", path, "--model", model, "--json", *rendered)
    assert ended.code == 65
    assert {found["kind"] for found in ended.json["differences"]} == {"prompt"}
    assert "QC-DATA-059" in ended.err


def test_convert_writes_canonical_rows_within_the_bound(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    alpaca = '{"instruction": "Add.", "input": "2+2", "output": "4"}'
    path = rows_file(tmp_path, alpaca, "{", name="alpaca.jsonl")
    refused = here(capsys, "data", "convert", path, "--output", tmp_path / "out", "--json")
    assert refused.code == 65
    assert not (tmp_path / "out").exists()
    half = ("--set", "bad_rows=skip", "--set", "bad_rows_limit=0.5")
    ended = here(capsys, "data", "convert", path, "--output", tmp_path / "out", "--json", *half)
    assert (ended.code, ended.json["rows"], ended.json["rejected"]) == (0, 1, 1)
    (line,) = (tmp_path / "out" / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [m["role"] for m in json.loads(line)["messages"]] == ["user", "assistant"]
    assert here(capsys, "data", "schema").json["title"] == "qcore canonical row"
