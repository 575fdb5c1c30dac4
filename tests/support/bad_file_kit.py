"""Bad data files for tests: what an entry of their tables is, and makers of small files.

`support.bad_files` joins the tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROW = {
    "messages": [{"role": "user", "content": "Hi, é?"}, {"role": "assistant", "content": "Yes."}]
}
GOOD = json.dumps(ROW, ensure_ascii=False).encode()
TWO = GOOD + b"\n" + GOOD + b"\n"
MIB = 1 << 20


@dataclass(frozen=True)
class Bad:
    """A bad file.

    Attributes:
        make: makes it below a folder; returns what a user would name.
        code: of the only error.
        words: part of the message.
        field: start of the error's field; ``None``: there is none.
        file: name of the file in the error; empty: the one that was made.
    """

    make: Callable[[Path], str]
    code: str
    words: str
    field: str | None = "line 1"
    file: str = ""


def of(name: str, data: bytes | Callable[[], bytes]) -> Callable[[Path], str]:
    """A maker of one file with this content."""

    def make(folder: Path) -> str:
        path = folder / name
        path.write_bytes(data if isinstance(data, bytes) else data())
        return str(path)

    return make


def jsonl(data: bytes | Callable[[], bytes], code: str, words: str, field: str = "line 1") -> Bad:
    return Bad(of("rows.jsonl", data), code, words, field)


def second(raw: bytes, words: str, code: str = "QC-DATA-004") -> Bad:
    """A JSONL file whose second line is bad."""
    return jsonl(GOOD + b"\n" + raw + b"\n" + GOOD + b"\n", code, words, "line 2")


def named(
    name: str, data: bytes | Callable[[], bytes], code: str, words: str, field: str = "line 1"
) -> Bad:
    return Bad(of(name, data), code, words, field)


def with_value(value: str) -> bytes:
    return GOOD[:-1] + f', "extra": {value}}}'.encode()
