"""Schema checks of YAML data files (presets, SKU records): required keys, types, and errors.

This file decides how a file that must have a fixed shape (presets, SKU records) is read: which
keys a mapping has, what counts as a text, a list, a number, and which error (`Contract`) names a
value that does not fit. It leaves YAML itself to `qcore.config.yaml`, and what a file must hold to
the file's own reader.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from .yaml import MappingNode, Node, ScalarNode, SequenceNode, read

INTEGER = re.compile(r"-?\d(_?\d)*")
NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Contract:
    """The contract of a kind of file.

    Attributes:
        code: code of a breach.
        what: the statement, such as ``breaks the preset contract``.
    """

    code: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """One value of a data file: each method returns it in a shape, or raises the breach.

    Attributes:
        node: the value; ``None`` where the file has none.
        contract: what the file must keep.
        file: the file, for errors.
        place: where in the file, dotted; empty for the whole file.
    """

    node: Node | None
    contract: Contract
    file: Path
    place: str = ""

    @classmethod
    def of_file(cls, file: Path, contract: Contract) -> Expect:
        """The whole of a file. Raises `UsageError`: ``QC-YAML-*``."""
        return cls(node=read(file), contract=contract, file=file)

    def renamed(self, place: str) -> Expect:
        """The same value under another place, such as the id of a record."""
        return replace(self, place=place)

    def breach(self, found: str, expected: str) -> UsageError:
        """The error that this value breaks the contract."""
        return UsageError(
            self.contract.code,
            self.contract.what,
            file=self.file,
            field=self.place or None,
            found=found,
            expected=expected,
        )

    def keys(self, keys: Sequence[str], *, optional: Sequence[str] = ()) -> dict[str, Expect]:
        """The entries of a mapping that has these keys and no other."""
        if not isinstance(self.node, MappingNode):
            raise self.breach("something else", f"a mapping of {', '.join(keys)}")
        for key in self.node.entries:
            if key not in keys:
                raise self.breach(f"the key {key}", ", ".join(keys))
        for key in keys:
            if key not in self.node.entries and key not in optional:
                raise self.breach(f"no {key}", ", ".join(keys))
        return self.mapping()

    def mapping(self, what: str = "a mapping") -> dict[str, Expect]:
        """The entries of a mapping of any keys; none where the value is absent."""
        if self.node is None:
            return {}
        if not isinstance(self.node, MappingNode):
            raise self.breach("something else", what)
        return {key: self._below(key, node) for key, node in self.node.entries.items()}

    def items(self) -> tuple[Expect, ...]:
        """The items of a list; none where the value is absent."""
        if self.node is None:
            return ()
        if not isinstance(self.node, SequenceNode):
            raise self.breach("something else", "a list")
        return tuple(self._below(str(index), node) for index, node in enumerate(self.node.items))

    def text(self) -> str:
        """A text that is not empty, on one line."""
        if not isinstance(self.node, ScalarNode) or not self.node.text.strip():
            raise self.breach("no text", "text")
        return " ".join(self.node.text.split())

    def texts(self) -> tuple[str, ...]:
        """A list of at least one text."""
        if not isinstance(self.node, SequenceNode) or not self.node.items:
            raise self.breach("something else", "a list of texts")
        return tuple(replace(self, node=item).text() for item in self.node.items)

    def choice(self, choices: Sequence[str]) -> str:
        """One of these words."""
        text = self.text()
        if text not in choices:
            *others, last = choices
            expected = f"{', '.join(others)} or {last}" if others else last
            raise self.breach(repr(text), expected)
        return text

    def boolean(self) -> bool:
        """``true`` or ``false``."""
        return self.choice(("true", "false")) == "true"

    def integer(self) -> int:
        """A whole number, ``_`` between digits allowed, without quotes."""
        text = self.text()
        if not INTEGER.fullmatch(text) or (isinstance(self.node, ScalarNode) and self.node.quoted):
            raise self.breach(repr(text), "a whole number")
        return int(text)

    def number(self) -> float:
        """A number."""
        text = self.text()
        if not NUMBER.fullmatch(text):
            raise self.breach(repr(text), "a number")
        return float(text)

    def date(self) -> str:
        """A date, ``YYYY-MM-DD``."""
        text = self.text()
        try:
            return datetime.date.fromisoformat(text).isoformat()
        except ValueError:
            raise self.breach(repr(text), "a date, YYYY-MM-DD") from None

    def _below(self, word: str, node: Node) -> Expect:
        return replace(self, node=node, place=f"{self.place}.{word}".strip("."))
