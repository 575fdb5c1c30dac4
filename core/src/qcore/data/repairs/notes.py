"""What all repairs of a row share: its turns with their places, its context and its findings.

This file decides how a repair names a place, reports and refuses. `qcore.data.repairs.repair` runs
the repairs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...api.media import RowError
from ...api.records import ParseReply
from ..findings import NOTE, WARNING, DataFinding
from .template_probes import Abilities


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairContext:
    """What a repair knows of the run.

    Attributes:
        assistant: name of the role that is trained.
        marks: the tags of a think block; ``None`` for a format without thinking.
        call_tags: those of a tool call; ``None`` for a format without them.
        result_tags: those of a tool result; ``None`` for a format without them.
        parse: the inverse of the template; ``None`` without one.
        abilities: what the chat template renders.
        kinds: kinds of media of the installed readers; ``<kind>`` is the mark of one.
        refused: codes whose warnings refuse the row instead.
    """

    assistant: str = "assistant"
    marks: tuple[str, str] | None = None
    call_tags: tuple[str, str] | None = None
    result_tags: tuple[str, str] | None = None
    parse: ParseReply | None = None
    abilities: Abilities = field(default_factory=Abilities)
    kinds: tuple[str, ...] = ()
    refused: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class PlacedMessage:
    """A message and its place in the row as it was written.

    Attributes:
        index: position among the messages, before repairs.
        message: the message; must not be mutated.
    """

    index: int
    message: Mapping[str, Any]

    @property
    def role(self) -> str:
        """Role of the message, or an empty string."""
        role = self.message.get("role")
        return role if isinstance(role, str) else ""

    @property
    def at(self) -> str:
        """The place, for errors."""
        return f"messages[{self.index}]"

    @property
    def calls(self) -> Sequence[Any]:
        """Its tool calls."""
        calls = self.message.get("tool_calls")
        return calls if isinstance(calls, list) else ()

    def but(self, **changed: Any) -> PlacedMessage:
        """The message with other values; ``None`` removes a key."""
        message = {**self.message, **changed}
        return PlacedMessage(self.index, {k: v for k, v in message.items() if v is not None})


@dataclass(slots=True)
class Notes:
    """Collects the findings on one row.

    Attributes:
        row: number of the row.
        refused: codes whose warnings refuse the row instead.
        found: the findings.
    """

    row: int
    refused: Collection[str] = ()
    found: list[DataFinding] = field(default_factory=list)

    def note(self, code: str, at: str, message: str) -> None:
        """Report a repair that loses nothing."""
        self.found.append(
            DataFinding(code=code, severity=NOTE, row=self.row, field=at, message=message)
        )

    def warn(self, code: str, at: str, message: str, fix: str = "") -> None:
        """Report something that is probably wrong.

        Raises:
            RowError: the code is one of those that refuse a row.
        """
        if code in self.refused:
            raise RowError(code, message, at=at, fix=fix or None)
        self.found.append(
            DataFinding(
                code=code, severity=WARNING, row=self.row, field=at, message=message, fix=fix
            )
        )


def text_only(content: Any) -> str | None:
    """The text of a content without media; ``None`` for any other content."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    return None


def functions_of(tools: Any) -> dict[str, Mapping[str, Any]]:
    """Descriptions of functions by name; the first of a name counts."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools if isinstance(tools, list | tuple) else ():
        described = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(described, dict) and isinstance(described.get("name"), str):
            found.setdefault(described["name"], described)
    return found


def function_of(call: Any) -> Mapping[str, Any] | None:
    """Name and arguments of a call, nested or flat."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    return inner if isinstance(inner, dict) and isinstance(inner.get("name"), str) else None
