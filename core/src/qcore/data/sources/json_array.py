"""The elements of a JSON array document, one after the other, in constant memory.

This file decides where an element begins and ends, by its brackets and strings alone; an element
that is not JSON does not hide those after it. `qcore.data.sources.jsonl` parses the elements.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from .file_kinds import HEAD
from .jsonl import MAX_LINE, MAX_SKIPPED
from .streams import Damaged

_BLOCK: Final = 1 << 20
_SPACE: Final = b" \t\r\n"
_BOM: Final = b"\xef\xbb\xbf"
_STRING: Final = rb'"(?:[^"\\]++|\\.)*+"'
# A list or object without others in it: most of a conversation, skipped in one step.
_FLAT: Final = rb'[\[{](?:[^"\[\]{}]++|' + _STRING + rb")*+[\]}]"
_PASSED: Final = rb"++|" + _STRING + rb"|" + _FLAT + rb")*+"
# Up to the next bracket, or a quote whose string does not end in the block, or its end.
_BELOW: Final = re.compile(rb'(?:[^"\[\]{}]' + _PASSED + rb'(["\[\]{}]|\Z)', re.DOTALL)
_TOP: Final = re.compile(rb'(?:[^"\[\]{},]' + _PASSED + rb'(["\[\]{},]|\Z)', re.DOTALL)
_INSIDE: Final = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


def elements(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield number (from 1) and bytes of every element of a document that starts with ``[``.

    An element longer than `MAX_LINE` is yielded as ``None``.

    Raises:
        Damaged: the document ends inside of the array, or text follows it.
    """
    scan = _Scan()
    first = file.read(HEAD)  # `file_kind` has found the bracket in it
    yield from scan.feed(first.removeprefix(_BOM).lstrip(_SPACE).removeprefix(b"["))
    while block := file.read(_BLOCK):
        yield from scan.feed(block)
    if not scan.closed:
        raise Damaged("the file ends inside of the JSON array")


class _Scan:
    """State of the scan between two blocks."""

    def __init__(self) -> None:
        self.closed = False
        self._number = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._parts: list[bytes] = []
        self._length = 0

    def feed(self, block: bytes) -> Iterator[tuple[int, bytes | None]]:
        """Scan a block; yield the elements that end in it."""
        start = at = 0
        while not self.closed:
            if self._in_string:
                at = self._string(block, at)
            match = None if self._in_string else (_BELOW if self._depth else _TOP).match(block, at)
            if match is None or not match[1]:
                self._keep(block[start:])
                return
            at = match.end()
            if not self._ends(match[1]):
                continue
            self._keep(block[start : at - 1])
            start = at
            raw = self._take()
            if raw != b"" or self._number or not self.closed:  # `[]` has no element, `[1,]` has two
                self._number += 1
                yield self._number, raw
        if block[at:].strip(_SPACE):
            raise Damaged("text follows the JSON array")

    def _string(self, block: bytes, at: int) -> int:
        """Position after the string, or the end of the block."""
        if self._escaped and at < len(block):
            self._escaped, at = False, at + 1
        match = _INSIDE.match(block, at)
        at = at if match is None else match.end()
        if at < len(block):
            self._in_string = block[at : at + 1] != b'"'
            self._escaped = self._in_string  # a backslash that ends the block
            at += 1
        return at

    def _ends(self, mark: bytes) -> bool:
        """Whether a structural character ends an element."""
        if mark == b'"':
            self._in_string = True
        elif mark in b"[{":
            self._depth += 1
        elif mark in b"]}":
            if not self._depth and mark == b"]":
                self.closed = True
            self._depth = max(0, self._depth - 1)
        return self.closed or (mark == b"," and not self._depth)

    def _keep(self, part: bytes) -> None:
        self._length += len(part)
        if self._length <= MAX_LINE:
            self._parts.append(part)
        else:
            self._parts.clear()
        if self._length > MAX_SKIPPED:
            raise Damaged(f"an element of more than {MAX_SKIPPED >> 30} GiB")

    def _take(self) -> bytes | None:
        raw = b"".join(self._parts).strip(_SPACE) if self._length <= MAX_LINE else None
        self._parts, self._length = [], 0
        return raw
