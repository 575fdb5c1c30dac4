"""Errors are copied with other facts, and a misspelled word gets one suggestion."""

from pathlib import Path

import pytest

from qcore.errors import (
    InputError,
    PreflightError,
    TrustError,
    UsageError,
    nearest,
    one_of_each,
)

CORE = Path(__file__).parents[2] / "core/src/qcore"
ROOMS = ("io", "config", "checkpoint", "skus", "data", "preflight", "adapter", "planning")


def test_replace_keeps_class_code_and_every_fact_that_is_not_named() -> None:
    error = TrustError("QC-A-001", "is so", file="f", field="x", found=1, expected=2, fix="do")
    copy = error.replace(file="g", found=None)
    assert type(copy) is TrustError
    assert vars(copy) == vars(error) | {"file": "g", "found": None}
    assert copy.message == "g: x: is so: expected 2"
    assert error.message == "f: x: is so: found 1, expected 2"
    with pytest.raises(TypeError):
        error.replace(status=3)


def test_replace_of_several_findings_changes_the_first() -> None:
    findings = PreflightError([UsageError("QC-A-001", "is so"), InputError("QC-B-001", "is too")])
    copy = findings.replace(file="f")
    assert [error.message for error in copy.errors] == ["f: is so", "is too"]
    assert (copy.exit_code, copy.file) == (2, "f")


def test_one_of_each_counts() -> None:
    problems = [InputError("QC-A-001", "is so", field=name) for name in "abc"]
    (only,) = one_of_each(problems)
    assert only.message == "a: is so (one of 3)"


def test_nearest() -> None:
    assert nearest("learnin_rate", iter(["r", "learning_rate"])) == "learning_rate"
    assert nearest("zzz", ["r", "learning_rate"]) is None
    assert nearest("ab", ["abcd"], cutoff=0.9) is None


def test_suggestions_have_one_home() -> None:
    users = [
        path.relative_to(CORE).as_posix()
        for room in ROOMS
        for path in (CORE / room).rglob("*.py")
        if "get_close_matches" in path.read_text(encoding="utf-8")
    ]
    assert not users, "they call qcore.errors.nearest"
