"""The text of every error, checked where it is written: statements and fixes join to one line.

An error is printed as ``where: what: found X, expected Y. Fix: do Z``. So a statement has no stop
at its end, a found or expected value does not begin with the word that is printed before it, and a
fix has no stop of its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for package in ("core", "qwen35_plugin", "qwen36_plugin", "multimodal_plugin")
    for path in (ROOT / package / "src").rglob("*.py")
)
_CODE = re.compile(r"QC-[A-Z0-9]+-\d{3}")
#: fact -> what its text may not match.
RULES = {
    "what": re.compile(
        r"^(found|expected|Fix)\b|[.:;,?!]\s*$|(?<!there )\bis no\b|\b([a-z]+) \2\b|\s{2}|\n"
    ),
    "found": re.compile(r"^found\b|[.;,]\s*$|\n"),
    "expected": re.compile(r"^expected\b|[.;,]\s*$|\n"),
    "fix": re.compile(r"^([Ff]ix)\b|[.;,:]\s*$|\b([a-z]+) \2\b|\s{2}|\n"),
}


def _text(node: ast.expr) -> str | None:
    """The literal parts of a text, with X for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values
        )
    if isinstance(node, ast.IfExp):
        return None
    return None


def _facts(path: Path) -> Iterator[tuple[int, str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        first = _text(node.args[0]) if node.args else None
        named = {word.arg: word.value for word in node.keywords if word.arg}
        code = first or (_text(named["code"]) if "code" in named else None)
        if code is None or not _CODE.fullmatch(code):
            continue
        values = {name: named[name] for name in RULES if name in named}
        if len(node.args) > 1:
            values["what"] = node.args[1]
        for name, value in values.items():
            for each in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                if (text := _text(each)) is not None:
                    yield each.lineno, name, text


def test_every_text_of_an_error_joins_to_one_line() -> None:
    seen = 0
    wrong = []
    for path in SOURCES:
        for line, fact, text in _facts(path):
            seen += 1
            if RULES[fact].search(text):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {fact}: {text!r}")
    assert seen > 1000
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        ("what", "is not a model."), ("what", "line 1 is no setting"), ("found", "found 3"),
        ("expected", "expected 4"), ("fix", "do this."), ("what", "is is wrong"),
        ("what", "did you mean x?"),
    ],
)  # fmt: skip
def test_the_rules_find_faults(fact: str, text: str) -> None:
    assert RULES[fact].search(text)
