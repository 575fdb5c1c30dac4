"""The message that a trained reply is to a server, against the message of the row.

This file decides what of a message is compared: reasoning, content, and the names and arguments of
calls. The reply is read by the parser of the chat format. A difference means that the model is
trained to say something else than the row: the template trims or moves text, or the text of the row
contains markup. `qcore.data.views.parity` compares prompts, tokens and labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...api.records import ChatFormat
from ..repairs.notes import functions_of, text_only
from ..think_block import has_marks, split_block, thinking_marks

TRIMMED = "the template trims whitespace"
_Call = tuple[str, Mapping[str, Any]]  # name and arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageDifference:
    """A part of a message that is not trained as the row has it.

    Attributes:
        field: the part, ``content`` or ``tool_calls[0].city``.
        cause: why they differ.
        trained: what a server reads in the reply.
        row: what the row has.
    """

    field: str
    cause: str
    trained: Any
    row: Any


@dataclass(slots=True)
class ReplyComparison:
    """Compares replies with the messages of a row.

    Attributes:
        tools: function descriptions of the row.
        format: the chat format; without a parser nothing is compared.
        compose: the normalization of the tokenizer.
    """

    tools: Sequence[Mapping[str, Any]] | None
    format: ChatFormat
    compose: Callable[[str], str]
    _marks: tuple[str, str] | None = field(init=False)

    def __post_init__(self) -> None:
        self._marks = thinking_marks(self.format)

    def reasons(self, message: Mapping[str, Any]) -> bool:
        """Whether a message has reasoning, so that it is served with thinking."""
        return bool(_canonical(message, self._marks).get("reasoning_content", "").strip())

    def differences(
        self, message: Mapping[str, Any], reply: str, *, thinking: bool
    ) -> Iterator[MessageDifference]:
        """The parts of a message that are not trained as they are.

        Args:
            message: of the row.
            reply: what is trained, with the end of the turn.
            thinking: whether the prompt opens a think block.
        """
        if self.format.parse is None:
            return
        wanted = _canonical(message, self._marks)
        read = self.format.parse(reply, self.tools, thinking=thinking)
        for name in ("reasoning_content", "content"):
            text, got = wanted.get(name, ""), read.get(name, "")
            if text is not None and self.compose(text) != got:
                cause = self._text_cause(name, self.compose(text), got, read)
                yield MessageDifference(field=name, cause=cause, trained=got, row=text)
        yield from self._calls(wanted.get("tool_calls", []), _pairs(read.get("tool_calls", [])))

    def _text_cause(self, name: str, text: str, got: str, read: Mapping[str, Any]) -> str:
        if text.strip() == got.strip():
            return TRIMMED
        if self._marks is not None and has_marks(text, self._marks):
            return "the text contains markup of reasoning"
        if name == "reasoning_content":
            return "the template leaves the reasoning out"
        if "tool_calls" in read:
            return "the text contains markup of calls"
        return "the template changes the text"

    def _calls(self, ours: Sequence[_Call], theirs: Sequence[_Call]) -> Iterator[MessageDifference]:
        names, read = ([name for name, _ in calls] for calls in (ours, theirs))
        if names != read:
            cause = "a name, a value or the text contains markup"
            yield MessageDifference(
                field="tool_calls", cause=cause, trained=", ".join(read), row=", ".join(names)
            )
            return
        for number, ((name, row), (_, reply)) in enumerate(zip(ours, theirs, strict=True)):
            for key in {**row, **reply}:
                both = key in row and key in reply
                if both and _same(self._value(row[key]), reply[key]):
                    continue
                value, got = row.get(key, "(absent)"), reply.get(key, "(absent)")
                yield MessageDifference(
                    field=f"tool_calls[{number}].{key}",
                    cause=self._value_cause(name, key, both, value, got),
                    trained=got,
                    row=value,
                )

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.compose(value)
        if isinstance(value, Mapping):
            return {self.compose(key): self._value(item) for key, item in value.items()}
        return [self._value(item) for item in value] if isinstance(value, list) else value

    def _value_cause(self, name: str, key: str, both: bool, value: Any, got: Any) -> str:
        if not both:
            return "a value or the name contains markup"
        if type(value) is type(got):
            return "the value contains markup"
        tools = self.tools if self.tools is not None else ()
        described = functions_of(list(tools)).get(name)
        if described is None:
            return "tools does not declare the function, so that every value is a string"
        parameters = described.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if not isinstance(properties, Mapping) or key not in properties:
            return "the function has no such property, so that the value is a string"
        return "the value does not have the one type that the schema gives to its text"


def _canonical(message: Mapping[str, Any], marks: tuple[str, str] | None) -> dict[str, Any]:
    """Reasoning, text and calls of a message; `None` for content with media."""
    content = text_only(message.get("content"))
    made: dict[str, Any] = {"content": content}
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str):
        made["reasoning_content"] = reasoning
    elif content is not None and (split := split_block(content, marks)):
        made["reasoning_content"], made["content"] = split
    made["tool_calls"] = _pairs(message.get("tool_calls") or ())
    return made


def _pairs(calls: Iterable[Any]) -> list[_Call]:
    """Name and arguments of calls, nested or flat."""
    functions = [call.get("function", call) for call in calls]
    return [(one["name"], one.get("arguments") or {}) for one in functions]


def _same(one: Any, other: Any) -> bool:
    """Equal values of equal types; an integer is the number of the same value."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)
