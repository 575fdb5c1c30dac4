"""Parity of training and serving: each trained turn against the prompt that serving shows.

This file decides what is compared, for each trained assistant turn of a sample:

- prompt: the sample's text begins with the prompt that the template renders of the messages before
  the turn, in the mode of thinking of the turn;
- tokens: the sample's token ids begin with the ids of that prompt alone, and those after it are the
  reply;
- labels: the reply is trained from its first token through the token that ends the turn, and
  nothing between the turns is. With ``reasoning=mask`` it is trained from its answer on;
- message: the reply, parsed as a server parses it, is the message of the row
  (`qcore.data.views.reply_message`).

Prompt, tokens and labels together mean: the served prompt and what is trained are the sample, token
for token. A difference of the message is a note: the tokens are those of serving all the same. A
reply that ``long_rows`` cuts is compared as far as it goes.

Code: ``QC-DATA-059``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...api.records import ChatFormat
from ...api.views import TemplateView
from ...errors import InputError
from ..findings import NOTE, WARNING, DataFinding
from ..rendering.masking import IGNORED
from ..rendering.pieces import normalized
from ..rendering.samples import first_difference
from ..rendering.turns import Turn, turns_of
from ..think_block import thinking_marks
from .reply_message import ReplyComparison

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..rendering.masking import Encoded

PROMPT, TOKENS, LABELS, MESSAGE = "prompt", "tokens", "labels", "message"
_WHAT = {
    PROMPT: "is trained after another prompt than serving shows",
    TOKENS: "is trained on other tokens than serving has",
    LABELS: "is not trained from its first token through the end of the turn",
    MESSAGE: "is not trained as the row has it",
}
_CODE = "QC-DATA-059"
_SHOWN = 60  #: characters of a text in a report

#: ``(text, number of messages in it) -> text`` with the placeholders of media expanded.
Expand = Callable[[str, int], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One difference between a trained turn and serving.

    Attributes:
        turn: index of the message.
        kind: ``prompt``, ``tokens``, ``labels`` or ``message``.
        field: the part of the message, ``content`` or ``tool_calls[0].city``; else empty.
        cause: why they differ.
        trained: what is trained, or shown before it; shortened.
        served: what serving shows, or what the row has; shortened.
    """

    turn: int
    kind: str
    field: str = ""
    cause: str
    trained: str
    served: str

    def finding(self, row: int) -> DataFinding:
        """The finding on a row; a note where the tokens of serving are trained."""
        noted = self.kind == MESSAGE
        return DataFinding(
            code=_CODE,
            severity=NOTE if noted else WARNING,
            row=row,
            field=f"messages[{self.turn}]" + (f".{self.field}" if self.field else ""),
            message=f"the turn {_WHAT[self.kind]}: {self.cause} (trained {self.trained}, "
            f"{'row' if noted else 'served'} {self.served})",
        )


def parity(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    samples: Iterable[Encoded],
    chat_format: ChatFormat,
    template: TemplateView,
    tokenizer: Tokenizer,
    *,
    variables: Mapping[str, Any] | None = None,
    expand: Expand | None = None,
    untrained: frozenset[int | None] = frozenset(),
    masked_reasoning: bool = False,
) -> tuple[Difference, ...]:
    """Compare the trained turns of a row with serving.

    Args:
        messages: the messages of the row, as the template reads them.
        tools: its function descriptions.
        samples: the samples of the row.
        chat_format: the format of rendered conversations; without a parser, messages are not
            compared.
        template: the checkpoint's.
        tokenizer: the checkpoint's.
        variables: variables of the template; the mode of thinking, if among them, is that of all
            turns.
        expand: expands the placeholders of media in a rendered text.
        untrained: ids of the placeholders of media.
        masked_reasoning: whether the row was rendered with ``reasoning=mask``.

    Returns:
        The differences, by sample and turn; empty if there are none.

    Raises:
        InputError: as `Template.render`, except that the template refuses a conversation.
    """
    check = _Parity(
        messages, tools, chat_format, template, tokenizer, variables or {}, expand, untrained,
        masked_reasoning,
    )  # fmt: skip
    return tuple(one for sample in samples for one in check.sample(sample))


@dataclass(slots=True)
class _Parity:
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    format: ChatFormat
    template: TemplateView
    tokenizer: Tokenizer
    variables: Mapping[str, Any]
    expand: Expand | None
    untrained: frozenset[int | None]
    masked: bool
    reply: ReplyComparison = field(init=False)
    header: str = field(init=False)
    marks: tuple[str, str] | None = field(init=False)

    def __post_init__(self) -> None:
        self.reply = ReplyComparison(self.tools, self.format, self._composed)
        self.header = self.format.turn_start + self.format.assistant + self.format.role_end
        self.marks = thinking_marks(self.format)

    def sample(self, sample: Encoded) -> Iterator[Difference]:
        """The differences of one sample."""
        turns = [t for t in turns_of(sample.text, self.format) if t.role == self.format.assistant]
        places = dict(zip(self._answers(), turns, strict=False))
        done = 0  # tokens whose labels are compared
        for index, end in zip(sample.turns, sample.ends, strict=True):
            if index not in places:
                yield self._differs(index, PROMPT, "the sample does not contain the turn")
                continue
            place = places[index]
            prompt = yield from self._prompt(sample.text, place, index)
            if prompt is None:
                shown, reply = sample.text[: place.reply], sample.text[place.reply : place.end]
                yield from self._message(reply, shown, index)
                done = end
                continue
            done = yield from self._turn(sample, place, prompt, index, done, end)
        trained = _first(sample.example.labels, done, lambda label: label != IGNORED)
        if trained < len(sample.example.labels):
            yield self._labels(
                sample, sample.turns[-1], "a token after the turn is trained", trained
            )

    def _answers(self) -> list[int]:
        return [n for n, m in enumerate(self.messages) if m["role"] == self.format.assistant]

    def _turn(
        self, sample: Encoded, place: Turn, prompt: str, index: int, done: int, end: int
    ) -> Generator[Difference, None, int]:
        """Compare the tokens and labels of a turn; how many tokens of the sample are compared."""
        ids = list(sample.example.ids)
        served = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        start = len(served)
        if ids[:start] != served:
            if ids == served[: len(ids)]:
                return len(ids)  # `long_rows` cut the turn off
            at = first_difference(ids, served)
            cause = "the tokenizer merges the end of the prompt with the reply"
            if at < start - 4:
                cause = "the tokens of the prompt are not those of its text"
            yield self._differs(index, TOKENS, cause, ids[at : at + 4], served[at : at + 4])
            return end
        closes = self.tokenizer.encode(self.format.turn_end, add_special_tokens=False).ids
        stop = _find(ids, closes, start)
        cut = stop < 0 and end > len(ids)
        if stop < 0 and not cut:
            yield self._labels(sample, index, "the turn does not end", len(ids) - 1)
            return end
        stop = len(ids) if cut else stop + len(closes)
        yield from self._trained(sample, index, done, start, stop)
        text = sample.text[len(prompt) : place.end]
        got = self.tokenizer.decode(ids[start:stop], skip_special_tokens=False)
        if not cut:
            if got != text:
                kind, cause, part = TOKENS, "the tokens of the reply are not those of its text", ""
                if not self._decodes(text):  # in serving, too
                    kind, cause, part = MESSAGE, "the tokenizer changes the text", "content"
                yield self._differs(index, kind, cause, got, text, part)
            yield from self._message(text, prompt, index)
        return stop

    def _decodes(self, text: str) -> bool:
        """Whether the tokenizer gives a text back as it is."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return bool(self.tokenizer.decode(ids, skip_special_tokens=False) == text)

    def _trained(
        self, sample: Encoded, index: int, done: int, start: int, stop: int
    ) -> Iterator[Difference]:
        """Compare the labels from the last turn through this one."""
        labels, ids = sample.example.labels, sample.example.ids
        early = _first(labels, done, lambda label: label != IGNORED)
        if early < start:
            yield self._labels(sample, index, "a token of the prompt is trained", early)
        first = start
        if self.masked and self.marks is not None and self.reply.reasons(self.messages[index]):
            first = min(_first(labels, start, lambda label: label != IGNORED), stop)
            block = self.tokenizer.decode(list(ids[start:first]), skip_special_tokens=False)
            if not block.rstrip().endswith(self.marks[1]) and first < len(ids):
                cause = "the answer is not trained from its first token"
                yield self._labels(sample, index, cause, first)
                return
        for at in range(first, stop):
            if labels[at] != ids[at] and ids[at] not in self.untrained:
                cause = f"a token of the reply has the label {labels[at]}"
                yield self._labels(sample, index, cause, at)
                return

    def _labels(self, sample: Encoded, index: int, cause: str, at: int) -> Difference:
        ids = list(sample.example.ids[at : at + 4])
        shown = self.tokenizer.decode(ids, skip_special_tokens=False)
        return self._differs(index, LABELS, cause, list(sample.example.labels[at : at + 4]), shown)

    def _served(self, index: int, thinking: bool) -> str:
        switch = self.format.thinking_switch
        own = {switch: thinking} if switch else {}
        text = self.template.render(
            self.messages[:index],
            self.tools,
            add_generation_prompt=True,
            **{**own, **self.variables},
        )
        return self._composed(text if self.expand is None else self.expand(text, index))

    def _composed(self, text: str) -> str:
        return normalized(text, self.tokenizer)

    def _prompt(
        self, text: str, place: Turn, index: int
    ) -> Generator[Difference, None, str | None]:
        """Compare the beginning of a text with the served prompt, which is returned if equal."""
        thinking = self.reply.reasons(self.messages[index])
        try:
            served = self._served(index, thinking)
        except InputError as error:
            if error.code not in ("QC-TEMPLATE-002", "QC-TEMPLATE-003"):
                raise
            why = f"the template renders no prompt for it: {error.found or error.what}"
            shown = text[: place.reply][-_SHOWN:]
            yield self._differs(index, PROMPT, why, shown, "no prompt")
            return None
        if text.startswith(served) and place.body <= len(served) < place.end:
            return served
        at = first_difference(text[: place.end], served)
        cause = self._cause(served, at, index, thinking)
        yield self._differs(index, PROMPT, cause, text[at : at + _SHOWN], served[at : at + _SHOWN])
        return None

    def _cause(self, served: str, at: int, index: int, thinking: bool) -> str:
        """Why a text differs from a served prompt from a character on."""
        if at >= served.rfind(self.header) + len(self.header):
            fixed = self.variables.get(self.format.thinking_switch, thinking)
            mode = "with" if fixed else "without"
            return f"serving prompts for this turn {mode} thinking"
        earlier = served.count(self.header, 0, at)
        answers = self._answers()
        if earlier and answers[earlier - 1] < index:
            return (
                f"the template renders message {answers[earlier - 1]} otherwise in the history of "
                "this turn"
            )
        return "the template renders the text before the first answer otherwise"

    def _message(self, reply: str, prompt: str, index: int) -> Iterator[Difference]:
        opens = self.marks is not None and prompt.rstrip().endswith(self.marks[0])
        for one in self.reply.differences(self.messages[index], reply, thinking=opens):
            yield self._differs(index, MESSAGE, one.cause, one.trained, one.row, one.field)

    def _differs(
        self, index: int, kind: str, cause: str, trained: Any = "", served: Any = "", at: str = ""
    ) -> Difference:
        return Difference(
            turn=index, kind=kind, field=at, cause=cause, trained=_short(trained),
            served=_short(served),
        )  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _first(values: Sequence[int], start: int, wanted: Callable[[int], bool]) -> int:
    """Position of the first wanted value from `start` on; the length without one."""
    return next((n for n in range(start, len(values)) if wanted(values[n])), len(values))


def _find(ids: Sequence[int], part: Sequence[int], start: int) -> int:
    """Where `part` begins in `ids` from `start` on; -1 if nowhere."""
    size = len(part)
    places = range(start, len(ids) - size + 1)
    return next((n for n in places if ids[n : n + size] == part), -1)
