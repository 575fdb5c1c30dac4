"""Core and the Qwen plugins name no modality in code: identifiers, imports, keys and tokens.

Prose is free: docstrings, comments and messages may say image, video or vision where the reader
needs it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("core/src", "qwen35_plugin/src", "qwen36_plugin/src")
#: Letters end a word: `add_vision_id` contains one, `revision` and `intermediate` contain none.
WORD = re.compile(r"(?<![a-z])(?:vision|visual|image|video|pixel)s?(?![a-z])", re.IGNORECASE)
FILES = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier, imported name, and string without white space.

    A string without white space is a key, a token or a tensor name, not a message.
    """
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text):
                yield line, text
            case ast.FunctionDef(name=text) | ast.AsyncFunctionDef(name=text):
                yield line, text
            case ast.ClassDef(name=text) | ast.alias(name=text):
                yield line, text
            case ast.ImportFrom(module=str(text)):
                yield line, text
            case ast.keyword(arg=str(text)):
                yield node.value.lineno, text
            case ast.Constant(value=str(text)) if not re.search(r"\s", text):
                yield line, text


def hits(text: str) -> list[str]:
    return [f"line {line}: {name}" for line, name in names(ast.parse(text)) if WORD.search(name)]


def test_every_source_folder_has_files() -> None:
    for folder in SOURCES:
        assert any(path.is_relative_to(ROOT / folder) for path in FILES)
    assert len(FILES) > 150


def test_no_name_of_a_modality() -> None:
    by_file = {name_of(path): hits(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in by_file.items() if lines} == {}


def test_no_plugin_of_a_modality_is_imported() -> None:
    imports = [
        (name_of(path), name)
        for path in FILES
        for _, name in names(ast.parse(path.read_text(encoding="utf-8")))
        if name.partition(".")[0] == "qcore_multimodal"
    ]
    assert imports == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("revision = supervised(intermediate)", 0),
        ('raise ValueError("no training row contains an image or video")', 0),
        ('"""The vision tower is loaded."""', 0),
        ("# two images", 0),
        ('key = "add_vision_id"', 1),
        ('tokens = ("<|image_pad|>", "<|VIDEO_pad|>")', 2),
        ('name = "model.visual.blocks"', 1),
        ("def image_rows(video): ...", 2),
        ("from . import vision", 1),
        ("call(pixels=image2)", 2),
    ],
)
def test_what_counts_as_a_name(text: str, count: int) -> None:
    assert len(hits(text)) == count
