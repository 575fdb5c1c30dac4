"""The tiers of the Makefile: one of them runs each test; what tests share is made once."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression
from support.child import in_child
from support.tiers import fast, pairs

MARKS = ("gpu", "slow", "timing")


def expressions() -> list[str]:
    """What the targets of the Makefile select by."""
    lines = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8").splitlines()
    runs = [
        re.search(r' -m (?:"([^"]+)"|(\w+))', line) for line in lines if "pytest" in line.lower()
    ]
    return [run[1] or run[2] for run in runs if run]


@pytest.mark.parametrize("marks", list(product((False, True), repeat=len(MARKS))), ids=str)
def test_one_target_runs_it_whatever_its_marks(marks: tuple[bool, ...]) -> None:
    given = dict(zip(MARKS, marks, strict=True))
    chosen = [
        text for text in expressions() if Expression.compile(text).evaluate(lambda n, **_: given[n])
    ]
    assert len(chosen) == 1, (given, chosen)


def test_cases_that_were_not_chosen_are_slow() -> None:
    one, two = fast({"a": 1, "b": 2}, "b")
    assert (one.values, [mark.name for mark in one.marks], two) == (("a",), ["slow"], "b")
    first, other = fast([(1, 2), (3, 4)], names=2)
    assert (first, other.values) == ((1, 2), (3, 4))
    (lengths,) = fast([(1,), (2, 3)], (1,))[1:]
    assert lengths.values == ((2, 3),)
    with pytest.raises(AssertionError, match="not a case"):
        fast(["a"], "c")


def test_pairs_have_every_value_of_both() -> None:
    assert pairs("ab", [1, 2, 3]) == [("a", 1), ("b", 2), ("a", 3)]


def test_a_shared_folder_is_made_once(once: Callable[..., Path], tmp_path: Path) -> None:
    made: list[Path] = []

    def write(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("x")

    name = f"test-tiers-{tmp_path.parent.name}"
    assert once(name, write) == once(name, write)
    assert len(made) == 1


def test_a_folder_that_was_not_finished_is_made_anew(once: Callable[..., Path]) -> None:
    def breaks(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError

    with pytest.raises(OSError):
        once("test-tiers-half", breaks)
    folder = once("test-tiers-half", lambda home: (home / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_what_a_child_raises_fails_the_test() -> None:
    assert in_child(int)("3") is None
    with pytest.raises(AssertionError, match="ValueError: invalid literal"):
        in_child(int)("three")
