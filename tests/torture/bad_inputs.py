"""Named bad inputs: each is a line of data, and must be refused with the code that it names.

This file decides what a line of ``bad_inputs/*.yaml`` means (docs/torture.md has the fields). An
input is refused if the command fails with the expected code, without a traceback, in time, and
without an output.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from torture.bench import Bench, Outcome
from torture.client import Command, Ended
from torture.judge import error_code, uncleanness

_FOLDER: Final = Path(__file__).with_name("bad_inputs")
_VALUE: Final = "$"  #: stands for the value of a member of a family
_LIMIT: Final = 20.0  #: seconds that a refusal may take on a busy machine
_COMMAND: Final = ("name", "code", "run", "model", "adapter", "env", "each")

#: Commands by the word that a line may use for them.
RUNS: Final[Mapping[str, str]] = {
    "inspect": "inspect model",
    "plan": "plan model --gpu H100-80",
    "train": "train --model model --data rows.jsonl --output out --device cpu --set=max_steps=1"
    " --set=quantization=none --set=dtype=fp32 --set=target_groups=[attn] --set=r=2",
    "merge": "merge --model model --adapter adapter --output out --no-proof",
    "trust": "merge --model model --adapter adapter --output out --no-proof --trust-base",
    "verify": "verify adapter",
    "show": "adapter show adapter",
    "check": "data check rows.jsonl --model model",
    "generate": "generate model --prompt hi --max-new-tokens 1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BadInput:
    """One input.

    Attributes:
        name: unique.
        code: that it must be refused with.
        run: the command.
        model: the good folder that ``model`` is a copy of.
        adapter: the good adapter that ``adapter`` is a copy of.
        env: of the command.
        edits: (verb of `EDITS`, argument), in order.
    """

    name: str
    code: str
    run: str
    model: str
    adapter: str
    env: Mapping[str, str]
    edits: tuple[tuple[str, Any], ...]


def bad_inputs() -> list[BadInput]:
    """All inputs of all files.

    Raises:
        ValueError: a field is unknown, or a name is used twice.
    """
    found: dict[str, BadInput] = {}
    for path in sorted(_FOLDER.glob("*.yaml")):
        for line in yaml.safe_load(path.read_text("utf-8")):
            for one in members(path.stem, line):
                if one.name in found:
                    raise ValueError(f"{path.name}: {one.name} is used twice")
                found[one.name] = one
    return list(found.values())


def members(area: str, line: Mapping[str, Any]) -> Iterator[BadInput]:
    """The inputs of a line: one, or one for each value of its family."""
    if "each" not in line:
        yield _input(area, line, line["name"], line["code"])
        return
    for label, value in line["each"].items():
        code = line["code"]
        if isinstance(code, dict):
            code = code.get(label, code.get("other"))
        yield _input(area, _filled(line, value), f"{line['name']}/{label}", code)


def _filled(tree: Any, value: Any) -> Any:
    """A tree with the value in place of its sign; within a longer text, as text."""
    if isinstance(tree, dict):
        return {_filled(key, value): _filled(each, value) for key, each in tree.items()}
    if isinstance(tree, list):
        return [_filled(each, value) for each in tree]
    if tree == _VALUE:
        return value
    if isinstance(tree, str) and _VALUE in tree:
        return tree.replace(_VALUE, value if isinstance(value, str) else json.dumps(value))
    return tree


def _input(area: str, line: Mapping[str, Any], name: str, code: object) -> BadInput:
    unknown = line.keys() - {*_COMMAND, *EDITS}
    if unknown or not isinstance(code, str):
        raise ValueError(f"{area}.yaml: {name}: {sorted(unknown) or 'no code'}")
    run = line.get("run", "inspect")
    return BadInput(
        name=f"{area}/{name}", code=code, run=RUNS.get(run, run), model=line.get("model", "dense"),
        adapter=line.get("adapter", ""), env=line.get("env", {}),
        edits=tuple((verb, line[verb]) for verb in EDITS if verb in line),
    )  # fmt: skip


# -- edits; paths are relative to the working folder


def _replace(path: Path, data: bytes | str) -> None:
    """Write a file anew: the copies of good files are hard links."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data)


def _descend(tree: Any, steps: list[str]) -> Any:
    for step in steps:
        tree = tree[int(step)] if isinstance(tree, list) else tree[step]
    return tree


def _edit_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    _replace(path, json.dumps(value))


def _set(work: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """FILE: {key/of/JSON: value}."""
    for file, changes in files.items():
        for key, value in changes.items():
            *steps, last = key.split("/")

            def change(tree: Any, steps: Any = steps, last: Any = last, value: Any = value) -> None:
                at = _descend(tree, steps)
                at[int(last) if isinstance(at, list) else last] = value

            _edit_json(work / file, change)


def _drop(work: Path, files: Mapping[str, list[str]]) -> None:
    """FILE: [key/of/JSON]."""
    for file, keys in files.items():
        for key in keys:
            *steps, last = key.split("/")

            def change(tree: Any, steps: Any = steps, last: Any = last) -> None:
                _descend(tree, steps).pop(last)

            _edit_json(work / file, change)


def _text(work: Path, files: Mapping[str, str]) -> None:
    """FILE: content."""
    for file, content in files.items():
        _replace(work / file, content)


def _bytes(work: Path, files: Mapping[str, str]) -> None:
    """FILE: content in hexadecimal digits."""
    for file, digits in files.items():
        _replace(work / file, bytes.fromhex(digits))


def _append(work: Path, files: Mapping[str, str]) -> None:
    """FILE: text that is added."""
    for file, content in files.items():
        _replace(work / file, (work / file).read_bytes() + content.encode())


def _sub(work: Path, files: Mapping[str, list[str]]) -> None:
    """FILE: [old text, new text]; all occurrences."""
    for file, (old, new) in files.items():
        text = (work / file).read_text("utf-8")
        if old not in text:
            raise ValueError(f"{file} has no {old!r}")
        _replace(work / file, text.replace(old, new))


def _cut(work: Path, files: Mapping[str, int]) -> None:
    """FILE: bytes that are kept; negative: that are cut off the end."""
    for file, count in files.items():
        _replace(work / file, (work / file).read_bytes()[:count])


def _put(work: Path, files: Mapping[str, Mapping[int, str]]) -> None:
    """FILE: {offset: bytes in hexadecimal digits}."""
    for file, changes in files.items():
        data = bytearray((work / file).read_bytes())
        for at, digits in changes.items():
            new = bytes.fromhex(digits)
            start = at % len(data)
            data[start : start + len(new)] = new
        _replace(work / file, bytes(data))


def _header(work: Path, files: Mapping[str, Any]) -> None:
    """FILE: {key/of/the/header: value}, or the header's text; ``FIRST`` is the first tensor."""
    for file, changes in files.items():
        data = (work / file).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        text = data[8 : 8 + length].decode()
        if isinstance(changes, str):
            text = changes
        else:
            header = json.loads(text)
            first = next(name for name in header if name != "__metadata__")
            for key, value in changes.items():
                *steps, last = [first if step == "FIRST" else step for step in key.split("|")]
                _descend(header, steps)[last] = value
            text = json.dumps(header)
        _replace(work / file, struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])


def _rename(work: Path, files: Mapping[str, list[str]]) -> None:
    """FILE: [old, new] text in the names of the header."""
    for file, (old, new) in files.items():
        data = (work / file).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        text = data[8 : 8 + length].decode().replace(old, new)
        _replace(work / file, struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])


def _value(work: Path, files: Mapping[str, Mapping[str, str]]) -> None:
    """FILE: {tensor: first bytes of its data in hexadecimal digits}."""
    for file, changes in files.items():
        data = bytearray((work / file).read_bytes())
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        for name, digits in changes.items():
            new = bytes.fromhex(digits)
            start = 8 + length + header[name]["data_offsets"][0]
            data[start : start + len(new)] = new
        _replace(work / file, bytes(data))


def _remove(work: Path, files: list[str]) -> None:
    """Files that are deleted."""
    for file in files:
        (work / file).unlink()


def _folder(work: Path, files: list[str]) -> None:
    """Folders that stand where files were."""
    for file in files:
        (work / file).unlink(missing_ok=True)
        (work / file).mkdir(parents=True)


def _link(work: Path, files: Mapping[str, str]) -> None:
    """FILE: target of a symbolic link."""
    for file, target in files.items():
        (work / file).unlink(missing_ok=True)
        (work / file).symlink_to(target)


def _fifo(work: Path, files: list[str]) -> None:
    """Pipes."""
    for file in files:
        (work / file).unlink(missing_ok=True)
        os.mkfifo(work / file)


def _move(work: Path, files: Mapping[str, str]) -> None:
    """FILE: new name."""
    for file, name in files.items():
        (work / file).rename(work / name)


EDITS: Final[Mapping[str, Callable[[Path, Any], None]]] = {
    "move": _move, "remove": _remove, "text": _text, "bytes": _bytes, "set": _set, "drop": _drop,
    "sub": _sub, "append": _append, "header": _header, "cut": _cut, "rename": _rename, "put": _put,
    "value": _value, "folder": _folder, "link": _link, "fifo": _fifo,
}  # fmt: skip


# -- runs


def refused(bench: Bench, bad: BadInput) -> Outcome:
    """Run an input's command; the outcome is ``recovered`` if it is refused as it should be."""
    _prepare(bench, bad)
    command = Command(arguments=shlex.split(bad.run), options={}, env=bad.env)
    ended = bench.client.run(command, bench.work, limit=_LIMIT)
    verdict, detail = _judged(bench, bad, ended)
    return Outcome(verdict=verdict, detail=detail, seconds=ended.seconds)


def _prepare(bench: Bench, bad: BadInput) -> None:
    """The working folder of an input."""
    if bad.adapter not in ("", "foreign"):
        bench.make_adapters()
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir(parents=True)
    shutil.copytree(bench.inputs / bad.model, bench.work / "model", copy_function=os.link)
    if bad.adapter:
        source = bench.inputs / ("" if bad.adapter == "foreign" else "adapters") / bad.adapter
        shutil.copytree(source, bench.work / "adapter", copy_function=os.link)
    for name in ("rows.jsonl", "media"):
        link = bench.work / name
        link.symlink_to(bench.inputs / name)
    for verb, argument in bad.edits:
        EDITS[verb](bench.work, argument)


def _judged(bench: Bench, bad: BadInput, ended: Ended) -> tuple[str, str]:
    if ended.hung:
        return "hung", f"{_LIMIT:.0f} s"
    if ended.status == 0:
        return "silent", f"accepted, where {bad.code} is expected"
    if why := uncleanness(ended):
        return "unclean", why
    if error_code(ended) != bad.code:
        return "unclean", f"{bad.code} is expected: {ended.last_line[:200]}"
    if (bench.work / "out").exists():
        return "mixed", "the output exists"
    if (bench.work / "canary").exists():
        return "silent", "code of the input was executed"
    return "recovered", ""
