"""One rule for names that a model's index, a manifest or a data file gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcore.io.safe_path import inside, name_problem

UNSAFE = ["", ".", "..", "/x", "a\\b", "C:x", "a:b", "a\0b", "a\nb", "\x7f", "\udc80", "x" * 256]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_are_unsafe_at_any_depth(name: str) -> None:
    assert name_problem(name) is not None
    assert name_problem(f"folder/{name}", depth=2) is not None
    assert name_problem(f"{name}/file", depth=2) is not None


@pytest.mark.parametrize("name", ["a", "a.b-c_d", "..a", "a b", "naïve", "x" * 255])
def test_plain_names(name: str) -> None:
    assert name_problem(name) is None
    assert name_problem(f"{name}/{name}", depth=2) is None
    assert name_problem(f"{name}/{name}") is not None
    assert name_problem(f"{name}/{name}/{name}", depth=2) == "more than 1 folder deep"


def test_inside_follows_every_link(tmp_path: Path) -> None:
    folder, outer = tmp_path / "data", tmp_path / "outer"
    for made in (folder / "sub", outer):
        made.mkdir(parents=True)
        (made / "file").touch()
    os.symlink(outer / "file", folder / "out")
    os.symlink(folder / "sub" / "file", folder / "in")
    os.symlink(folder, tmp_path / "link")
    for root in (folder, tmp_path / "link"):
        assert inside(root, "sub/file") == folder / "sub" / "file"
        assert inside(root, "in") == folder / "sub" / "file"
        assert inside(root, "sub/../in") == folder / "sub" / "file"
        assert inside(root, "absent") == folder / "absent"
        for name in ("out", "..", "../data/in", "sub/../../outer/file", str(outer / "file")):
            assert inside(root, name) is None, name
