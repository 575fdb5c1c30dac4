"""Strict JSON Lines: one JSON value per line of a file.

This file decides what counts as a line and as JSON: UTF-8, one value per line, no duplicate keys,
no NaN or infinity, bounded line length and nesting. `qcore.data.rows` interprets the values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ...api.media import RowError
from ...errors import InputError
from ...io import strict_json

MAX_LINE = 16 << 20  #: bytes; longer lines are refused without loading them
MAX_DEPTH = 64
MAX_SKIPPED = 1 << 30  #: bytes; a longer line is not skipped either, its file is refused

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Hasher(Protocol):
    """The part of a `hashlib` object that is used here."""

    def update(self, data: bytes, /) -> None: ...


def raw_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield number (from 1) and bytes of every line, in constant memory.

    A UTF-8 byte order mark is removed. A line longer than `MAX_LINE` is yielded as ``None``.

    Args:
        file: the bytes.
        path: the file that they come from, for errors.

    Raises:
        InputError: ``QC-DATA-031`` a line longer than `MAX_SKIPPED`.
    """
    number = 0
    while raw := file.readline(_BLOCK):
        number += 1
        whole: bytes | None = raw.removeprefix(_BOM) if number == 1 else raw
        if len(raw) == _BLOCK and not raw.endswith(b"\n"):
            whole = _rest(file, path, number, raw)
        yield number, whole


def _rest(file: BinaryIO, path: Path, number: int, first: bytes) -> bytes | None:
    """The whole line that begins with `first`; ``None`` if it is too long."""
    parts, length = [first.removeprefix(_BOM) if number == 1 else first], len(first)
    while not first.endswith(b"\n") and (first := file.readline(_BLOCK)):
        length += len(first)
        parts = [*parts, first] if length <= MAX_LINE else []
        if length > MAX_SKIPPED:
            raise _endless(path, number)
    return b"".join(parts) if length <= MAX_LINE else None


def _endless(path: Path, line: int) -> InputError:
    return InputError(
        "QC-DATA-031",
        "has a line that does not end",
        file=path,
        field=f"line {line}",
        found=f"more than {MAX_SKIPPED >> 30} GiB without a line break",
        expected=f"at most {MAX_LINE} bytes",
        fix="write one JSON object a line",
    )


def parse(raw: bytes | str, *, at: str = "") -> Any:
    """Parse one JSON value strictly.

    Args:
        raw: UTF-8 bytes, or text that is already decoded.
        at: path for the error.

    Raises:
        RowError: ``QC-DATA-003`` not UTF-8, ``QC-DATA-004`` not JSON, a duplicate key, NaN or
            infinity, nested too deep.
    """
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError(
                "QC-DATA-003",
                "is not UTF-8",
                at=at,
                found=f"{error.reason} 0x{error.object[error.start]:02x} at byte {error.start + 1}",
                fix="save the file as UTF-8",
            ) from None
    try:
        value = strict_json.loads(raw, finite=True)
    except json.JSONDecodeError as error:
        byte = len(raw[: error.pos].encode("utf-8", "surrogatepass")) + 1
        raise RowError(
            "QC-DATA-004",
            "is not JSON",
            at=at,
            found=f"{error.msg} at byte {byte}",
            fix=f"write {at.rpartition('.')[2]} as valid JSON, or as the value instead of a string"
            if at
            else "write one whole JSON object a line",
        ) from None
    except RecursionError:
        raise _too_deep(at) from None
    except strict_json.DuplicateKeyError as error:
        raise RowError(
            "QC-DATA-004",
            "has a duplicate key",
            at=at,
            found=repr(error.key),
            expected="each key once",
            fix="keep one of the two",
        ) from None
    except strict_json.NonFiniteError as error:
        raise _not_finite(error, at) from None
    except ValueError:  # an integer with more digits than Python converts
        raise RowError(
            "QC-DATA-004",
            "has a number with thousands of digits",
            at=at,
            fix="write it as a string",
        ) from None
    if raw.count("{") + raw.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise _too_deep(at)
    return value


def _not_finite(error: strict_json.NonFiniteError, at: str) -> RowError:
    if error.overflow:
        what, expected, fix = "has a number that overflows a float", "a finite number", "a string"
    else:
        what, expected, fix = "has a number that is not JSON", "a finite number or null", "null"
    return RowError(
        "QC-DATA-004",
        what,
        at=at,
        found=error.text[:40],
        expected=expected,
        fix=f"write it as {fix}",
    )


def _too_deep(at: str) -> RowError:
    return RowError(
        "QC-DATA-004",
        "is nested too deep",
        at=at,
        expected=f"at most {MAX_DEPTH} levels",
        fix="write the inner levels as a JSON string",
    )


def too_long() -> RowError:
    """The error of a row longer than `MAX_LINE`."""
    return RowError(
        "QC-DATA-004",
        "is too long",
        expected=f"at most {MAX_LINE} bytes",
        fix="split the conversation, and name media files instead of embedding them",
    )


def _depth(value: Any) -> int:
    deepest, todo = 0, [(value, 1)]
    while todo:
        node, depth = todo.pop()
        deepest = max(deepest, depth)
        if isinstance(node, dict):
            todo.extend((child, depth + 1) for child in node.values())
        elif isinstance(node, list):
            todo.extend((child, depth + 1) for child in node)
    return deepest
