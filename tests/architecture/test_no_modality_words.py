"""Core and the qwen plugins know of no modality: their code has no word of one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("core/src", "qwen35_plugin/src", "qwen36_plugin/src")
#: A word is what letters end: `add_vision_id` has one, `revision` and `intermediate` have none.
WORD = re.compile(r"(?<![a-z])(?:vision|visual|image|video|pixel)s?(?![a-z])", re.IGNORECASE)
FILES = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def words(text: str) -> list[str]:
    return [f"line {text.count(chr(10), 0, hit.start()) + 1}: {hit.group()}"
            for hit in WORD.finditer(text)]  # fmt: skip


def test_there_are_files_of_each() -> None:
    for folder in SOURCES:
        assert any(path.is_relative_to(ROOT / folder) for path in FILES)
    assert len(FILES) > 150


def test_no_word_of_a_modality() -> None:
    hits = {name_of(path): words(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in hits.items() if lines} == {}


def imported(tree: ast.AST) -> set[str]:
    """Names of all modules that are imported, wherever in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_no_plugin_of_a_modality_is_imported() -> None:
    hits = [
        (name_of(path), module)
        for path in FILES
        for module in sorted(imported(ast.parse(path.read_text(encoding="utf-8"))))
        if module.partition(".")[0] == "qcore_multimodal"
    ]
    assert hits == []


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
