"""The examples convert, and docs/data.md shows what they become."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.json_schema import problems

from qcore.data.formats import Formats, schema
from qcore.data.formats.turns import ROLES

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.jsonl"))
PAGE = (ROOT / "docs/data.md").read_text("utf-8")
BLOCK = re.compile(r"^```(json row|json canonical|yaml fields)\n(.*?)^```$", re.M | re.S)
FORMATS = Formats(kinds=("image", "video"))


def rows_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def policies(path: Path) -> dict[str, Any]:
    """The field mapping and ignored columns of the mix file beside an example."""
    mix = path.with_suffix(".yaml")
    if not mix.exists():
        return {}
    (source,) = yaml.safe_load(mix.read_text("utf-8"))["sources"]
    assert source["path"] == path.name
    return {"fields": source.get("fields", {}), "ignore": source.get("ignore_columns", ())}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_converts(path: Path) -> None:
    for row in rows_of(path):
        read = FORMATS.read(row, **policies(path))
        assert problems(read.row, schema()) == []
        assert read.row["messages"][-1]["role"] == "assistant"
        if path.stem in FORMATS.names:
            assert read.format == path.stem or "messages" in row
        for message in read.row["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else ():
                where = part.get("image", "data:")
                assert where.startswith("data:") or (path.parent / where).is_file()


def test_every_format_has_an_example_and_a_section() -> None:
    assert set(FORMATS.names) <= {path.stem for path in EXAMPLES}
    for name in FORMATS.names:
        assert f"](../examples/{name}.jsonl)" in PAGE
        assert f": `{name}`\n" in PAGE
    for path in (ROOT / "examples").iterdir():
        assert path.suffix in (".jsonl", ".yaml", ".png")


def test_every_row_of_the_page_becomes_the_row_below_it() -> None:
    fields: dict[str, Any] = {}
    row: Any = None
    seen = 0
    for kind, body in BLOCK.findall(PAGE):
        if kind == "yaml fields":
            fields = yaml.safe_load(body)
        elif kind == "json row":
            row = json.loads(body)
        else:
            canonical = json.loads(body)
            assert problems(canonical, schema()) == []
            read = FORMATS.read(canonical if row is None else row, fields=fields)
            assert (read.row, read.ignored) == (canonical, ())
            fields, row = {}, None
            seen += 1
    assert seen == 9


def test_the_roles_of_the_page_are_read() -> None:
    table = PAGE.partition("| role | read as |")[2].partition("\n\n")[0]
    listed = {
        name: right.strip(" `")
        for line in table.splitlines()[2:]
        for left, right in [line.strip("|").split("|")]
        for name in re.findall(r"`(\w+)`", left)
    }
    assert listed.keys() <= ROLES.keys()
    for name, role in listed.items():
        assert ROLES[name] == ("call" if role.startswith("a call") else role)
