"""Parity of training and serving: each trained turn against the prompt that serving shows.

This file decides what is compared, for each trained assistant turn:

- prompt: the sample's text up to the reply is the prompt that the template renders of the messages
  before it, in the mode of thinking of the turn;
- tokens: the sample's tokens up to the reply are the tokens of that prompt alone, so that no token
  is half prompt and half reply;
- message: the reply, parsed as a server parses it, is the message of the row.

A difference is reported with its cause. A difference of the message means that the model is trained
to say something else than the row; the tokens are those of serving all the same.

Code: ``QC-DATA-059``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...api.records import ChatFormat
from ...api.views import TemplateView
from ...errors import InputError
from ..findings import NOTE, WARNING, DataFinding
from ..rendering.pieces import normalized
from ..repairs.notes import functions_of, text_only
from ..think_block import split_block, thinking_marks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..rendering.samples import Sample

PROMPT, TOKENS, MESSAGE = "prompt", "tokens", "message"
TRIMMED = "the template trims whitespace"
_CODE = "QC-DATA-059"
_SHOWN = 60  #: characters of a text in a report

#: ``(text, number of messages in it) -> text`` with the placeholders of media expanded.
Expand = Callable[[str, int], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One difference between a trained turn and serving.

    Attributes:
        turn: index of the message.
        kind: ``prompt``, ``tokens`` or ``message``.
        field: the part of the message, ``content`` or ``tool_calls[0].city``; empty for a prompt.
        cause: why they differ.
        trained: what is trained, or shown before it; shortened.
        served: what serving shows, or what the row says; shortened.
    """

    turn: int
    kind: str
    field: str = ""
    cause: str
    trained: str
    served: str

    def finding(self, row: int) -> DataFinding:
        """The finding on a row; a note where the tokens of serving are trained."""
        at = f"messages[{self.turn}]" + (f".{self.field}" if self.field else "")
        what = "is not trained as the row has it" if self.kind == MESSAGE else (
            f"is trained after other {self.kind} than serving shows" if self.kind == TOKENS
            else "is trained after another prompt than serving shows"
        )  # fmt: skip
        return DataFinding(
            code=_CODE,
            severity=NOTE if self.kind == MESSAGE else WARNING,
            row=row,
            field=at,
            message=f"the turn {what}: {self.cause} (trained {self.trained}, "
            f"{'row' if self.kind == MESSAGE else 'served'} {self.served})",
        )


def parity(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    samples: Iterable[Sample],
    chat_format: ChatFormat,
    template: TemplateView,
    *,
    tokenizer: Tokenizer | None = None,
    variables: Mapping[str, Any] | None = None,
    expand: Expand | None = None,
) -> tuple[Difference, ...]:
    """Compare the trained turns of a row with serving.

    Args:
        messages: the messages of the row, as the template reads them.
        tools: its function descriptions.
        samples: the samples of the row.
        chat_format: the format of rendered conversations; without a parser, messages are not
            compared.
        template: the checkpoint's.
        tokenizer: without it, tokens are not compared.
        variables: variables of the template; the mode of thinking, if among them, is that of all
            turns.
        expand: expands the placeholders of media in a rendered text.

    Returns:
        The differences, by sample and turn; empty if there are none.

    Raises:
        InputError: as `Template.render`, except that the template refuses a conversation.
    """
    check = _Parity(messages, tools, chat_format, template, tokenizer, variables or {}, expand)
    return tuple(found for sample in samples for found in check.sample(sample))


@dataclass(slots=True)
class _Parity:
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    format: ChatFormat
    template: TemplateView
    tokenizer: Tokenizer | None
    variables: Mapping[str, Any]
    expand: Expand | None
    marks: tuple[str, str] | None = field(init=False)

    def __post_init__(self) -> None:
        self.marks = thinking_marks(self.format)

    def sample(self, sample: Sample) -> Iterator[Difference]:
        """The differences of one sample."""
        text = sample.text if self.tokenizer is None else normalized(sample.text, self.tokenizer)
        bodies = list(self._bodies(text))
        said = [n for n, m in enumerate(self.messages) if m["role"] == self.format.assistant]
        places = dict(zip(said, bodies, strict=False))
        ids: list[int] = []
        starts: list[int] = []
        if self.tokenizer is not None:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            ids, starts = encoding.ids, [start for start, _ in encoding.offsets]
        for index in sample.turns:
            if index not in places:
                yield self._differs(index, PROMPT, "the sample does not contain the turn", "", "")
                continue
            start = self._tail(text, places[index])
            prompt = yield from self._prompt(text, start, index)
            if prompt is not None and self.tokenizer is not None:
                served = self.tokenizer.encode(prompt, add_special_tokens=False).ids
                yield from self._tokens(ids[: bisect_left(starts, start)], served, index)
            end = text.find(self.format.turn_end, start)
            reply = text[start : len(text) if end < 0 else end + len(self.format.turn_end)]
            yield from self._message(reply, self._opens(text[:start]), index)

    def _bodies(self, text: str) -> Iterator[int]:
        """Where the assistant turns of a text begin, after their headers."""
        header = self.format.turn_start + self.format.assistant + self.format.role_end
        at = text.find(header)
        while at >= 0:
            yield at + len(header)
            at = text.find(header, at + len(header))

    def _tail(self, text: str, body: int) -> int:
        """Where the reply begins, after the prompt tail."""
        tails = sorted(self.format.prompt_tails, key=len, reverse=True)
        return body + len(next((tail for tail in tails if text.startswith(tail, body)), ""))

    def _opens(self, prompt: str) -> bool:
        return self.marks is not None and prompt.rstrip().endswith(self.marks[0])

    def _served(self, index: int, thinking: bool) -> str:
        switch = self.format.thinking_switch
        own = {switch: thinking} if switch else {}
        text = self.template.render(
            self.messages[:index],
            self.tools,
            add_generation_prompt=True,
            **{**own, **self.variables},
        )
        text = text if self.expand is None else self.expand(text, index)
        return text if self.tokenizer is None else normalized(text, self.tokenizer)

    def _reasons(self, index: int) -> bool:
        """Whether the turn has reasoning, so that it is served with thinking."""
        wanted = _canonical(self.messages[index], self.marks)
        return bool(wanted.get("reasoning_content", "").strip())

    def _prompt(self, text: str, start: int, index: int) -> Generator[Difference, None, str | None]:
        """Compare a prompt; the served one if they are equal."""
        thinking = self._reasons(index)
        try:
            served = self._served(index, thinking)
        except InputError as error:
            if error.code not in ("QC-TEMPLATE-002", "QC-TEMPLATE-003"):
                raise
            why = f"the template renders no prompt for it: {error.found or error.what}"
            yield self._differs(index, PROMPT, why, text[:start][-_SHOWN:], "no prompt")
            return None
        shown = text[:start]
        if shown == served:
            return served
        place = next(
            (n for n, (a, b) in enumerate(zip(shown, served, strict=False)) if a != b),
            min(len(shown), len(served)),
        )
        cause = self._cause(shown, served, place, index, thinking)
        yield self._differs(
            index, PROMPT, cause, shown[place : place + _SHOWN], served[place : place + _SHOWN]
        )
        return None

    def _cause(self, shown: str, served: str, place: int, index: int, thinking: bool) -> str:
        """Why two prompts differ from `place` on."""
        header = self.format.turn_start + self.format.assistant + self.format.role_end
        last = served.rfind(header) + len(header)
        if place >= last:
            mode = "with" if thinking else "without"
            return f"serving prompts for this turn {mode} thinking"
        earlier = served.count(header, 0, place)
        said = [n for n, m in enumerate(self.messages) if m["role"] == self.format.assistant]
        if earlier and said[earlier - 1] < index:
            return (
                f"the template renders message {said[earlier - 1]} otherwise in the history of "
                "this turn"
            )
        return "the template renders the text before the first answer otherwise"

    def _tokens(self, trained: list[int], served: list[int], index: int) -> Iterator[Difference]:
        if trained == served:
            return
        yield self._differs(
            index, TOKENS, "the tokenizer merges the end of the prompt with the reply",
            str(trained[-4:]), str(served[-4:]),
        )  # fmt: skip

    def _message(self, reply: str, thinking: bool, index: int) -> Iterator[Difference]:
        if self.format.parse is None:
            return
        wanted = _canonical(self.messages[index], self.marks)
        found = self.format.parse(reply, self.tools, thinking=thinking)
        for name in ("reasoning_content", "content"):
            said, got = wanted.get(name, ""), found.get(name, "")
            if said is not None and self._composed(said) != got:
                cause = self._text_cause(name, self._composed(said), got, found)
                yield self._differs(index, MESSAGE, cause, got, said, name)
        yield from self._calls(wanted, found, index)

    def _composed(self, text: str) -> str:
        return text if self.tokenizer is None else normalized(text, self.tokenizer)

    def _text_cause(self, name: str, said: str, got: str, found: Mapping[str, Any]) -> str:
        if said.strip() == got.strip():
            return TRIMMED
        if self.marks is not None and any(mark in said for mark in self.marks):
            return "the text contains markup of reasoning"
        if name == "reasoning_content":
            return "the template leaves the reasoning out"
        return "the text contains markup of calls" if "tool_calls" in found else (
            "the template changes the text"
        )  # fmt: skip

    def _calls(
        self, wanted: Mapping[str, Any], found: Mapping[str, Any], index: int
    ) -> Iterator[Difference]:
        said, got = wanted.get("tool_calls", []), found.get("tool_calls", [])
        names = [[name for name, _ in calls] for calls in (said, _pairs(got))]
        if names[0] != names[1]:
            yield self._differs(index, MESSAGE, "a name, a value or the text contains markup",
                                ", ".join(names[1]), ", ".join(names[0]), "tool_calls")  # fmt: skip
            return
        for number, ((name, ours), (_, theirs)) in enumerate(zip(said, _pairs(got), strict=True)):
            for key in {**ours, **theirs}:
                if key in ours and key in theirs and _same(self._value(ours[key]), theirs[key]):
                    continue
                one, other = ours.get(key, "(absent)"), theirs.get(key, "(absent)")
                cause = self._value_cause(name, key, key in ours and key in theirs, one, other)
                yield self._differs(
                    index, MESSAGE, cause, other, one, f"tool_calls[{number}].{key}"
                )

    def _value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._composed(value)
        if isinstance(value, Mapping):
            return {self._composed(key): self._value(item) for key, item in value.items()}
        return [self._value(item) for item in value] if isinstance(value, list) else value

    def _value_cause(self, name: str, key: str, both: bool, said: Any, got: Any) -> str:
        if not both:
            return "a value or the name contains markup"
        if type(said) is type(got):
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

    def _differs(
        self, index: int, kind: str, cause: str, trained: Any, served: Any, at: str = ""
    ) -> Difference:
        return Difference(
            turn=index, kind=kind, field=at, cause=cause, trained=_short(trained),
            served=_short(served),
        )  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


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


def _pairs(calls: Iterable[Any]) -> list[tuple[str, Mapping[str, Any]]]:
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
