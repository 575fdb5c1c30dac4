"""A strict YAML reader: a tree of untyped scalars, lists and mappings.

This file decides which YAML is accepted: one document of plain mappings, lists and scalars.
Duplicate keys, tags, anchors, aliases, deep nesting, files over 1 MiB and broken encoding are
refused with their line. Scalars stay text, because only the reader of a field knows its type
(`qcore.config.convert`): ``2e-4`` is a number, ``3.5`` may be a name, and ``no`` is never silently
false.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..io.plain_file import open_plain

if TYPE_CHECKING:
    from yaml.events import Event

MAX_BYTES = 1 << 20
MAX_DEPTH = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalarNode:
    """A scalar as written; a quoted one is always a string."""

    text: str
    quoted: bool
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceNode:
    """A list of nodes."""

    items: tuple[Node, ...]
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingNode:
    """A mapping of nodes, in the order of the file."""

    entries: dict[str, Node] = field(default_factory=dict)
    line: int = 1


Node = ScalarNode | SequenceNode | MappingNode


def read(path: Path, *, flag: str | None = None) -> Node | None:
    """Read one YAML file; ``None`` if it is empty.

    Args:
        path: the file.
        flag: flag that named it, for the error.

    Raises:
        UsageError: ``QC-YAML-001`` unreadable, ``QC-YAML-002`` refused YAML.
    """
    try:
        with open(open_plain(path), "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        fixes = {
            errno.EACCES: "check its permissions",
            errno.EINVAL: "write the settings to a file and name it",
        }
        raise UsageError(
            "QC-YAML-001", "cannot be read", file=path, field=flag, found=error.strerror,
            fix=fixes.get(error.errno or 0, "name a file that exists"),
        ) from error  # fmt: skip
    if len(data) > MAX_BYTES:
        raise _refuse(path, 1, "more than 1 MiB", "a settings file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _refuse(path, line, "bytes that are not UTF-8", "UTF-8 text") from error
    return parse(text, path)


def parse(text: str, source: Path | str) -> Node | None:
    """Parse one document; ``None`` if it is empty.

    Raises:
        UsageError: ``QC-YAML-002``, naming ``source`` and the line.
    """
    import yaml

    try:
        return _Reader(yaml.parse(text, Loader=yaml.SafeLoader), source).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        raise _refuse(source, line, error.problem or "broken syntax", "YAML") from error
    except yaml.YAMLError as error:
        raise _refuse(source, 1, str(error), "YAML") from error


class _Reader:
    """Builds the tree from parser events, so that nothing is expanded."""

    def __init__(self, events: Iterator[Event], source: Path | str) -> None:
        self._events = events
        self._source = source

    def document(self) -> Node | None:
        """Read the only document of the stream."""
        from yaml import events as ev

        root: Node | None = None
        documents = 0
        for event in self._events:
            if isinstance(event, ev.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._refuse(event, "a second document", "one document")
                root = self._node(next(self._events), 1)
        if isinstance(root, ScalarNode) and not root.quoted and root.text == "":
            return None
        return root

    def _node(self, event: Event, depth: int) -> Node:
        from yaml import events as ev

        line = _line(event)
        if isinstance(event, ev.AliasEvent):
            raise self._refuse(event, f"the alias *{event.anchor}", "the value itself")
        if isinstance(event, ev.NodeEvent) and event.anchor is not None:
            raise self._refuse(event, f"the anchor &{event.anchor}", "no anchors")
        tag = getattr(event, "tag", None)
        if tag is not None and not (isinstance(event, ev.ScalarEvent) and tag == "!"):
            raise self._refuse(event, f"the tag {tag}", "no tags")
        if depth > MAX_DEPTH:
            raise self._refuse(event, f"more than {MAX_DEPTH} levels", "fewer")
        if isinstance(event, ev.ScalarEvent):
            return ScalarNode(text=event.value, quoted=event.style is not None, line=line)
        if isinstance(event, ev.SequenceStartEvent):
            return SequenceNode(items=tuple(self._children(depth)), line=line)
        return self._table(line, depth)

    def _children(self, depth: int) -> Iterator[Node]:
        from yaml import events as ev

        while not isinstance(event := next(self._events), ev.SequenceEndEvent):
            yield self._node(event, depth + 1)

    def _table(self, line: int, depth: int) -> MappingNode:
        from yaml import events as ev

        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), ev.MappingEndEvent):
            key = self._node(event, depth + 1)
            if not isinstance(key, ScalarNode):
                raise self._refuse(event, "a list or mapping as a key", "a name")
            if key.text in entries:
                raise self._refuse(event, f"the key {key.text} twice", "each key once")
            entries[key.text] = self._node(next(self._events), depth + 1)
        return MappingNode(entries=entries, line=line)

    def _refuse(self, event: Event, found: str, expected: str) -> UsageError:
        return _refuse(self._source, _line(event), found, expected)


def _line(event: Event) -> int:
    return 1 if event.start_mark is None else int(event.start_mark.line) + 1


def _refuse(source: Path | str, line: int, found: str, expected: str) -> UsageError:
    return UsageError(
        "QC-YAML-002", f"line {line} is refused", file=source, found=found, expected=expected
    )
