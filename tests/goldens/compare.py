"""Compare two records: ``python tests/goldens/compare.py OLD NEW``.

This file decides what counts as a difference between two versions and prints each on one line;
the exit status is 1 if there is any. Files of adapters and checkpoints must be equal byte by byte,
except MANIFEST.json and metrics.jsonl, which are compared as JSON. Of JSON, keys, types and values
must be equal, except where `rules` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from goldens.cases import CASES
from goldens.record import digest
from goldens.rules import Rules, type_name

MANIFEST, METRICS = "MANIFEST.json", "metrics.jsonl"
_SHOWN = 80  # characters of a value in a line


def compare(old: Path, new: Path, rules: Rules) -> Iterator[str]:
    """A line for each difference between two record folders."""
    yield from _environment(old, new)
    yield from differences(_read(old / "status.json"), _read(new / "status.json"), "exit status ")
    yield from differences(_read(old / "plain.json"), _read(new / "plain.json"), "without --json ")
    yield from differences(_read(old / "options.json"), _read(new / "options.json"), "--help ")
    verbs = {case.name: case.verb for case in CASES}
    for name in _names(old / "json", new / "json"):
        paths = [folder / "json" / name for folder in (old, new)]
        case = name.removesuffix(".json")
        if missing := _missing(*paths):
            yield f"json {case}: {missing}"
            continue
        masked = [rules.masked(_read(path), verbs.get(case, "")) for path in paths]
        yield from differences(masked[0], masked[1], f"json {case}: ")
    yield from _artifacts(old, new, rules)


def _environment(old: Path, new: Path) -> Iterator[str]:
    """Facts without which two records cannot be compared."""
    facts = [_read(folder / "record.json") for folder in (old, new)]
    for key in ("format", "scratch", "packages"):
        yield from differences(facts[0][key], facts[1][key], f"record {key} ")


def _artifacts(old: Path, new: Path, rules: Rules) -> Iterator[str]:
    listed = [_read(folder / "sha256.json") for folder in (old, new)]
    for name in sorted({*listed[0], *listed[1]}):
        paths = [folder / "artifacts" / name for folder in (old, new)]
        if missing := _missing(*paths):
            yield f"file {name}: {missing}"
            continue
        for path, sums in zip(paths, listed, strict=True):
            if digest(path) != sums.get(name):
                yield f"file {name}: {path} is not what its record's sha256.json says"
        kind = Path(name).name
        if kind in (MANIFEST, METRICS):
            values = [rules.masked(_documents(path), kind) for path in paths]
            yield from differences(values[0], values[1], f"file {name}: ")
        elif paths[0].read_bytes() != paths[1].read_bytes():
            yield f"file {name}: {_first_byte(paths[0].read_bytes(), paths[1].read_bytes())}"


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """A line for each place where two JSON values differ, types included."""
    if type(old) is not type(new):
        yield f"{path}: {_shown(old)} ({type_name(old)}) -> {_shown(new)} ({type_name(new)})"
    elif isinstance(old, dict):
        for key in sorted({*old, *new}):
            inner = f"{path}.{key}" if path[-1:] not in ("", " ") else f"{path}{key}"
            if key not in new:
                yield f"{inner}: key is missing, was {_shown(old[key])}"
            elif key not in old:
                yield f"{inner}: key is new: {_shown(new[key])}"
            else:
                yield from differences(old[key], new[key], inner)
    elif isinstance(old, list):
        if len(old) != len(new):
            yield f"{path}: {len(old)} -> {len(new)} entries"
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            yield from differences(before, after, f"{path}[{index}]")
    elif old != new:
        yield f"{path}: {_shown(old)} -> {_shown(new)}"


def _documents(path: Path) -> Any:
    """The JSON value of a file; a list of one value a line of JSON Lines."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.name == METRICS else _read(path)


def _first_byte(old: bytes, new: bytes) -> str:
    """Where two files differ, and in which tensor if they are safetensors of one layout."""
    if len(old) != len(new):
        return f"{len(old)} -> {len(new)} bytes"
    at = next(index for index, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
    return f"differs at byte {at} of {len(old)}{_tensor_at(old, at)}"


def _tensor_at(data: bytes, at: int) -> str:
    """The tensor of a safetensors file that holds byte `at`; empty for any other file."""
    length = int.from_bytes(data[:8], "little")
    if not 8 + length <= at < len(data) or data[8:9] != b"{":
        return ""
    header: Mapping[str, Any] = json.loads(data[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if begin <= at - 8 - length < end:
                return f", in tensor {name}"
    return ""


def _missing(old: Path, new: Path) -> str:
    return "" if old.exists() and new.exists() else "missing" if old.exists() else "new"


def _names(*folders: Path) -> list[str]:
    return sorted({path.name for folder in folders for path in folder.iterdir()})


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare two records.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    lines = list(compare(arguments.old, arguments.new, Rules.load()))
    for line in lines:
        print(line)
    print(f"{len(lines)} differences", file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
