"""Core and the qwen plugins know of no modality: no identifier and no import names one.

Prose may: a message that says "vision tower" is clearer than one that does not.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("core/src", "qwen35_plugin/src", "qwen36_plugin/src")
#: A word is what letters end: `add_vision_id` has one, `revision` and `intermediate` have none.
WORD = re.compile(r"(?<![a-z])(?:vision|visual|image|video|pixel)s?(?![a-z])", re.IGNORECASE)
FILES = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]


def words(text: str) -> list[str]:
    return [f"line {text.count(chr(10), 0, hit.start()) + 1}: {hit.group()}"
            for hit in WORD.finditer(text)]  # fmt: skip


def test_there_are_files_of_each() -> None:
    for folder in SOURCES:
        assert any(path.is_relative_to(ROOT / folder) for path in FILES)
    assert len(FILES) > 150


def identifiers(text: str) -> str:
    """The names in a file, each on its own line of the file."""
    lines = [""] * (text.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            lines[token.start[0] - 1] += f"{token.string} "
    return "\n".join(lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_identifier_names_a_modality(path: Path) -> None:
    assert words(identifiers(path.read_text(encoding="utf-8"))) == []


def test_prose_may_name_a_modality() -> None:
    text = '"""A vision tower."""\nx = 1  # of an image\n\nimage = x\n'
    assert words(identifiers(text)) == ["line 4: image"]


def imported(tree: ast.AST) -> set[str]:
    """Names of all modules that are imported, wherever in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_plugin_of_a_modality_is_imported(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [name for name in imported(tree) if name.partition(".")[0] == "qcore_multimodal"]


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("the revision of a supervised, intermediate provision", 0),
        ("subdivisions, imagery, pixelated, visualise", 0),
        ('"add_vision_id"', 1),
        ("<|image_pad|> and <|VIDEO_pad|>", 2),
        ("model.visual.blocks", 1),
        ("two images", 1),
        ("image2 and 3video", 2),
    ],
)
def test_what_a_word_is(text: str, hits: int) -> None:
    assert len(words(text)) == hits
