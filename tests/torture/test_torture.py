"""The torture tool itself: the shim fails the call that it should, and verdicts are right."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from torture import shim
from torture.bad_inputs import EDITS, bad_inputs, members
from torture.bench import Outcome
from torture.client import Ended
from torture.judge import differences, fingerprint, uncleanness
from torture.mutators import mutate
from torture.results import Results, Source

_SCRIPT = """
import os, sys
os.mkdir("d")
fd = os.open("d/f", os.O_CREAT | os.O_WRONLY)
os.write(fd, b"12345678")
os.fsync(fd)
os.close(fd)
os.rename("d/f", "d/g")
os.open("d/g", os.O_RDONLY)
os.write(1, b"not a file")
os.unlink("d/g")
os.rmdir("d")
"""
_CALLS = ["mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = shim.build(tmp_path_factory.mktemp("shim"))
    if built is None:
        pytest.skip("no C compiler")
    return built


def _disturbed(
    folder: Path, library: Path, fault: str = "", at: int = 0
) -> tuple[shim.Control, subprocess.CompletedProcess[str]]:
    """The script with one fault, or none."""
    work = folder / "work"
    work.mkdir()
    control = shim.Control(folder / "control")
    control.arm(work, shim.FAULTS[fault] if fault else None, at, log=True)
    env = os.environ | {"LD_PRELOAD": str(library), "TORTURE_CONTROL": str(control.path)}
    command = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(
        command, env=env, cwd=work, capture_output=True, text=True, check=False,
        start_new_session=True,
    )  # fmt: skip
    return control, done


def test_calls_that_change_files_are_counted(tmp_path: Path, library: Path) -> None:
    control, done = _disturbed(tmp_path, library)
    assert done.returncode == 0, done.stderr
    calls = control.calls()
    assert [call.name for call in calls] == _CALLS
    assert [call.number for call in calls] == list(range(1, 8))
    assert calls[4].target.endswith("work/d/g")
    assert control.counted() == (7, 0)


@pytest.mark.parametrize(("fault", "left", "code"), [
    ("kill", ["d", "d/f"], 0), ("torn", ["d", "d/f"], 4), ("eio", ["d", "d/f"], errno.EIO),
    ("enospc", ["d", "d/f"], errno.ENOSPC),
])  # fmt: skip
def test_a_write_meets_each_fault(
    tmp_path: Path, library: Path, fault: str, left: list[str], code: int
) -> None:
    """Killed before the write, or after half of it; or it fails with the error's number."""
    control, done = _disturbed(tmp_path, library, fault, at=3)
    work = tmp_path / "work"
    assert sorted(str(path.relative_to(work)) for path in work.rglob("*")) == left
    assert control.counted()[1] == 3
    if fault in ("kill", "torn"):
        assert done.returncode == -9
        assert (work / "d" / "f").stat().st_size == code
    else:
        assert f"[Errno {code}]" in done.stderr


def test_a_full_disk_stays_full_for_what_needs_space(tmp_path: Path, library: Path) -> None:
    """From the rename on: it needs no space, and neither does what follows."""
    control, done = _disturbed(tmp_path, library, "full", at=5)
    assert (done.returncode, control.counted()) == (0, (7, 5))


def test_what_a_clock_says_is_not_compared(tmp_path: Path) -> None:
    for name, seconds, loss in (("a", 1.0, 2.0), ("b", 3.0, 2.0), ("c", 1.0, 2.5)):
        (tmp_path / name).mkdir()
        row = {"step": 1, "loss": loss, "seconds": seconds}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        manifest = {"created": str(seconds), "files": {"metrics.jsonl": {"sha256": name}}}
        (tmp_path / name / "MANIFEST.json").write_text(json.dumps(manifest))
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert differences(a, b) == ""
    assert differences(a, c) == "metrics.jsonl"
    assert differences({}, a) == "MANIFEST.json, metrics.jsonl"


@pytest.mark.parametrize(("err", "clean"), [
    ("error[QC-WRITE-003] out: the disk is full", True),
    ("error[QC-INTERNAL-001] KeyError: 'a'", False),
    ("Traceback (most recent call last):\n  x\nKeyError: 'a'", False),
    ("", False),
])  # fmt: skip
def test_a_clean_failure_is_one_error_line(err: str, clean: bool) -> None:
    assert (uncleanness(Ended(73, 0.0, "", err, False)) == "") is clean


def test_results_go_on_where_they_stopped(tmp_path: Path) -> None:
    path, source = tmp_path / "results.jsonl", Source("abc", "1234567")
    first = Results(path, source)
    first.add("fault", "dense/train", "kill@1 mkdir", Outcome(verdict="recovered"))
    first.add("fault", "dense/train", "eio@1 mkdir", Outcome(verdict="lost", detail="no output"))
    first.add("peer", "peer/train", "eio@1 mkdir", Outcome(verdict="lost"))
    with path.open("a") as file:
        file.write('{"source": "abc", "ki')  # of a process that was killed
    again = Results(path, source)
    assert again.has("fault", "dense/train", "eio@1 mkdir")
    assert not again.has("fault", "dense/train", "eio@2 open")
    assert [line["key"] for line in again.bad()] == ["eio@1 mkdir"]
    assert "| fault points | 2 | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 2,000 |" in again.table()
    again.add("fault", "dense/train", "eio@2 open", Outcome(verdict="recovered"))
    assert Results(path, source).has("fault", "dense/train", "eio@2 open")
    assert not Results(path, Source("other", "1234567")).lines


def test_the_named_bad_inputs_are_many_and_have_codes_that_exist() -> None:
    inputs = bad_inputs()
    assert len(inputs) >= 500
    listed = (Path(__file__).parents[2] / "docs" / "errors.md").read_text("utf-8")
    assert {one.code for one in inputs if f"`{one.code}`" not in listed} == set()


def test_a_family_has_a_member_for_each_value() -> None:
    line = {
        "name": "rank", "run": "show --set=r=$", "each": {"zero": 0, "word": "x"},
        "set": {"adapter/adapter_config.json": {"r": "$"}}, "code": {"zero": "A", "other": "B"},
    }  # fmt: skip
    zero, word = members("adapter", line)
    assert (zero.name, zero.code, zero.run) == ("adapter/rank/zero", "A", "show --set=r=0")
    assert zero.edits == (("set", {"adapter/adapter_config.json": {"r": 0}}),)
    assert (word.code, word.edits[0][1]) == ("B", {"adapter/adapter_config.json": {"r": "x"}})
    with pytest.raises(ValueError, match="sett"):
        list(members("adapter", {"name": "a", "code": "A", "sett": {}}))


def test_edits_do_not_change_the_good_file(tmp_path: Path) -> None:
    """The copies are hard links."""
    good, work = tmp_path / "good.json", tmp_path / "work"
    good.write_text('{"a": {"b": [1, 2]}}')
    work.mkdir()
    for verb, argument, expected in (
        ("set", {"f": {"a/b/1": 7}}, '{"a": {"b": [1, 7]}}'),
        ("drop", {"f": ["a/b"]}, '{"a": {}}'),
        ("cut", {"f": -1}, '{"a": {"b": [1, 2]}'),
        ("put", {"f": {-1: "5d"}}, '{"a": {"b": [1, 2]}]'),
        ("sub", {"f": ["1", "3"]}, '{"a": {"b": [3, 2]}}'),
    ):
        (work / "f").unlink(missing_ok=True)
        (work / "f").hardlink_to(good)
        EDITS[verb](work, argument)
        assert (work / "f").read_text() == expected
    assert good.read_text() == '{"a": {"b": [1, 2]}}'


@pytest.mark.parametrize("form", ["bytes", "json", "safetensors"])
def test_mutations_repeat_with_their_seed_and_change_the_file(form: str) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    data = {"json": b'{"a": {"b": [1, 2], "c": "x"}, "d": null}'}.get(
        form, len(header).to_bytes(8, "little") + header + bytes(4)
    )
    made = [mutate(data, form, random.Random(seed)) for seed in range(300)]
    assert made == [mutate(data, form, random.Random(seed)) for seed in range(300)]
    assert sum(one != data for one in made) > 250
    assert len(set(made)) > 150
