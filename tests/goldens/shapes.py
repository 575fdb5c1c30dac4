"""The contract of ``--json`` in ``shapes.json``: ``python tests/goldens/shapes.py RECORD``.

This file decides what the contract holds of a recorded case: its exit status, its error code, and
the keys and types of its result. ``shapes.json`` also lists every error code with its exit status,
as docs/errors.md has them. The script rewrites the file from a record; run it only when the
contract is meant to change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from support.error_list import listed_codes

from goldens.cases import CASES
from goldens.rules import Rules, type_name

SHAPES = Path(__file__).with_name("shapes.json")


def shape_of(value: Any) -> Any:
    """The keys and types of a JSON value: a list becomes one entry that stands for all of its own.

    A leaf is the name of its type, ``int|null`` where entries of a list differ. A key that only
    some entries of a list have ends in ``?``.
    """
    if isinstance(value, dict):
        return {key: shape_of(entry) for key, entry in sorted(value.items())}
    if isinstance(value, list):
        return _merged([shape_of(entry) for entry in value])
    return type_name(value)


def _merged(shapes: list[Any]) -> list[Any]:
    """One shape for all leaves of a list, one for all its lists, one for all its objects."""
    leaves = {name for shape in shapes if isinstance(shape, str) for name in shape.split("|")}
    lists = [shape for shape in shapes if isinstance(shape, list)]
    objects = [shape for shape in shapes if isinstance(shape, dict)]
    merged: list[Any] = ["|".join(sorted(leaves))] if leaves else []
    if lists:
        merged.append(_merged([entry for shape in lists for entry in shape]))
    if objects:
        keys = sorted({key.removesuffix("?") for shape in objects for key in shape})
        merged.append(dict(_key(key, objects) for key in keys))
    return merged


def _key(key: str, objects: list[dict[str, Any]]) -> tuple[str, Any]:
    """One key of the objects of a list, and its shape; a list of shapes where kinds differ."""
    optional = any(key not in shape for shape in objects)
    having = [shape[name] for shape in objects for name in (key, f"{key}?") if name in shape]
    merged = _merged(having)
    return f"{key}?" if optional else key, merged[0] if len(merged) == 1 else merged


def contract(value: Any, status: int, verb: str, rules: Rules) -> dict[str, Any]:
    """What ``shapes.json`` holds of a case.

    Args:
        value: the JSON result.
        status: the exit status.
        verb: the verb, whose rules excuse names of ops.
        rules: of ``sentences.json``.
    """
    error = value.get("error")
    code = error["code"] if isinstance(error, dict) else None
    shape = shape_of(rules.masked(value, verb, values=False))
    return {"status": status, "code": code, "shape": shape}


def _of_record(record: Path, rules: Rules) -> Iterable[tuple[str, dict[str, Any]]]:
    statuses = json.loads((record / "status.json").read_text(encoding="utf-8"))
    for case in CASES:
        value = json.loads((record / "json" / f"{case.name}.json").read_text(encoding="utf-8"))
        yield case.name, contract(value, statuses[case.name], case.verb, rules)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Rewrite shapes.json from a record.")
    parser.add_argument("record", type=Path)
    record = parser.parse_args().record
    sections: dict[str, Mapping[str, Any]] = {
        "codes": dict(sorted(listed_codes().items())),
        "cases": dict(_of_record(record, Rules.load())),
    }
    SHAPES.write_text(_text(sections), encoding="utf-8")


def _text(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON with a line for each code and each case, so that a diff shows which changed."""
    parts = []
    for section, entries in sections.items():
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        parts.append(f"{json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
