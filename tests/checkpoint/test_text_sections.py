"""Where config.json describes the text model is asked in one place."""

from __future__ import annotations

from pathlib import Path

from qcore.checkpoint.checkpoint import text_sections

CORE = Path(__file__).parents[2] / "core/src/qcore"


def test_the_text_section_comes_before_the_top_level() -> None:
    config = {"text_config": {"a": 1}, "a": 2}
    assert text_sections(config) == ({"a": 1}, config)
    assert text_sections({"text_config": None}) == ({"text_config": None},)


def test_nothing_else_looks_it_up() -> None:
    users = [path.name for path in CORE.rglob("*.py") if '"text_config"' in path.read_text("utf-8")]
    assert users == ["checkpoint.py"]
