"""docs/python-api.md: its examples run, and it names every argument of every function."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import qcore
from qcore import api, testing

PAGE = Path(__file__).resolve().parents[2] / "docs/python-api.md"
FUNCTIONS = sorted({*qcore.__all__} - {"__version__", "hookimpl"})


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


def section(name: str) -> str:
    return text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_has_its_signature(name: str) -> None:
    """The first code span of a section is the call, with the names and defaults of the source."""
    call = section(name).partition("`")[2].partition("`")[0]
    call = " ".join(call.replace("\\\n", " ").split()).partition(" -> ")[0]
    function: Any = getattr(qcore, name)
    parameters = inspect.signature(function).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    expected = f"{name}{inspect.Signature(bare)}".replace("'", '"')
    assert call == expected


def test_each_public_name_is_listed() -> None:
    known = set(re.findall(r"`(\w+)[`(]", text()))
    assert {*api.__all__} <= known
    assert {*testing.__all__} <= known


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 10
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "merged" / "config.json").is_file()
    assert names["answer"].text == names["same"].text
