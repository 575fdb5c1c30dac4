"""Samples of a row: which renderings of a conversation are trained, and which characters of them.

This file decides how many samples a row becomes and which of their characters are supervised.

With ``history=as_served`` a turn is trained in the context that serving gives it: the prompt that
the template renders of the messages before it. A turn whose context is the beginning of a sample
of a later turn is trained in that sample; the others get a sample of their own, because templates
change the history and drop the reasoning of earlier turns. With ``history=as_rendered`` a
row is one sample, whatever the template makes of its history.

Trained is, in every trained turn, what follows the prompt that serving shows, through the
end-of-turn token. `qcore.data.rendering.row_plan` chooses the trained turns,
`qcore.checkpoint.chat_template` renders, `qcore.data.rendering.masking` turns characters into
tokens.

Codes: ``QC-DATA-040`` a turn that the template cannot serve, ``-041`` a turn that serving shows in
another context or asks for in another mode of thinking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...api.media import RowError
from ...api.records import ChatFormat
from ...errors import InputError
from ..policies import AS_RENDERED, MASK
from ..think_block import block_end
from .row_plan import RowPlan, TrainedTurn
from .turns import Turn, check_count, turns_of

if TYPE_CHECKING:
    from .pieces import PieceEncoder

PROMPT = "prompt"  #: `Span.why` of the header of a trained turn and of what serving adds to it
END_OF_TURN = "end of turn"  #: `Span.why` of the token that ends a trained turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A range of a sample and why it is trained or not.

    `start` and `end` are characters of the sample's text; `qcore.data.rendering.masking` gives the
    same spans in tokens.

    Attributes:
        start: first position.
        end: position after the last one.
        why: the reason, in a few words.
        trained: whether its positions are supervised.
    """

    start: int
    end: int
    why: str
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A sample before its text is final: media are expanded and spans laid out later.

    Attributes:
        sample: number within the row, from 1.
        text: as the template rendered it.
        count: number of messages in it.
        parsed: the turns of `text`, in order.
        tails: by index of each trained message: what its prompt has after the header of the turn.
        whys: by index of an assistant message that is not trained here: the reason.
        other_prompt: indexes of trained messages that serving shows another prompt.
    """

    sample: int
    text: str
    count: int
    parsed: tuple[Turn, ...]
    tails: Mapping[int, str]
    other_prompt: tuple[int, ...] = ()
    whys: Mapping[int, str] = field(default_factory=dict)

    @property
    def turns(self) -> tuple[int, ...]:
        """Indexes of the messages that are trained."""
        return tuple(self.tails)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ServedTurn:
    """A trained turn as serving has it.

    Attributes:
        index: of the message.
        text: the rendering of the conversation through it.
        parsed: the turns of `text`.
        place: of the turn in `text`.
        reply: where the prompt ends.
    """

    index: int
    text: str
    parsed: tuple[Turn, ...]
    place: Turn
    reply: int


def drafts(
    plan: RowPlan,
    texts: Sequence[str | InputError],
    chat_format: ChatFormat,
    pieces: PieceEncoder,
) -> list[Draft]:
    """The samples of a row, from the renderings that its plan asks for.

    Args:
        plan: of the row.
        texts: one for each of `RowPlan.prefixes`.
        chat_format: the format of `texts`.
        pieces: shows which prompts have other tokens alone than before their reply, so that no
            other sample may contain the turn.

    Raises:
        RowError: ``QC-MASK-001``, ``-002`` as in `check_count`, ``QC-DATA-040``, ``-041``.
        InputError: the template refuses the row.
    """
    if plan.policies.history == AS_RENDERED:
        return [_one_rendering(plan, texts, chat_format, pieces)]
    groups: list[list[_ServedTurn]] = []  # the last turn of each has the text of all
    for turn in reversed(list(_served(plan, texts, chat_format))):
        end = turn.text.rfind(chat_format.turn_end) + len(chat_format.turn_end)
        whole = turn.text[:end]
        shared = next((some for some in groups if some[-1].text.startswith(whole)), None)
        if shared is None or not _splits(turn.text, turn.place, turn.reply, pieces):
            groups.append([turn])
        else:
            shared.insert(0, turn)
    groups.reverse()
    number = {turn.index: at for at, some in enumerate(groups, 1) for turn in some}
    return [
        Draft(
            sample=at,
            text=some[-1].text,
            count=some[-1].index + 1,
            parsed=some[-1].parsed,
            tails={turn.index: turn.text[turn.place.body : turn.reply] for turn in some},
            whys={n: f"history, trained in sample {k}" for n, k in number.items() if k != at}
            | dict(plan.untrained),
        )
        for at, some in enumerate(groups, 1)
    ]


def _one_rendering(
    plan: RowPlan,
    texts: Sequence[str | InputError],
    chat_format: ChatFormat,
    pieces: PieceEncoder,
) -> Draft:
    """The sample of a row whose history is trained as it is rendered."""
    text, *prompts = texts
    if isinstance(text, InputError):
        raise text
    count = len(plan.row.messages)
    parsed = tuple(turns_of(text, chat_format))
    places = _places(plan, parsed, chat_format, count)
    tails, other = {}, []
    for turn, prompt in zip(plan.turns, prompts, strict=True):
        place = places[turn.index]
        tails[turn.index] = text[place.body : place.reply]
        if isinstance(prompt, str):
            tail = _tail(prompt, chat_format)
            reply = place.body + len(tail)
            if text.startswith(tail, place.body) and _splits(text, place, reply, pieces):
                tails[turn.index] = tail
                if text.startswith(prompt) and len(prompt) == reply:
                    continue
        other.append(turn.index)
    return Draft(
        sample=1, text=text, count=count, parsed=parsed, tails=tails,
        other_prompt=tuple(other), whys=plan.untrained,
    )  # fmt: skip


def _splits(text: str, place: Turn, reply: int, pieces: PieceEncoder) -> bool:
    """Whether no token is half prompt and half reply."""
    return pieces.splits(text, (place.start, reply))


def _places(
    plan: RowPlan, parsed: Sequence[Turn], chat_format: ChatFormat, count: int
) -> dict[int, Turn]:
    """The assistant's turns of a rendering by the index of their message."""
    messages = plan.row.messages[:count]
    indexes = [n for n, m in enumerate(messages) if m["role"] == chat_format.assistant]
    return dict(zip(indexes, check_count(parsed, chat_format, len(indexes)), strict=True))


def _tail(prompt: str, chat_format: ChatFormat) -> str:
    """What a prompt has after the header of the turn that is asked for."""
    header = chat_format.turn_start + chat_format.assistant + chat_format.role_end
    return prompt.rpartition(header)[2] if header in prompt else ""


def _served(
    plan: RowPlan, texts: Sequence[str | InputError], chat_format: ChatFormat
) -> Iterator[_ServedTurn]:
    """The rendering of each trained turn, proved to begin with its served prompt."""
    for turn, text, prompt in zip(plan.turns, texts[::2], texts[1::2], strict=True):
        for made in (text, prompt):
            if isinstance(made, InputError):
                raise _not_served(plan, turn, made)
        assert isinstance(text, str)
        assert isinstance(prompt, str)
        parsed = tuple(turns_of(text, chat_format))
        place = _places(plan, parsed, chat_format, turn.index + 1)[turn.index]
        if not text.startswith(prompt) or len(prompt) < place.body:
            raise _other_context(plan, turn, text, prompt, place)
        yield _ServedTurn(
            index=turn.index, text=text, parsed=parsed, place=place, reply=len(prompt)
        )


def _not_served(plan: RowPlan, turn: TrainedTurn, error: InputError) -> RowError | InputError:
    """The error of a turn that the template does not render."""
    if turn is plan.turns[-1]:
        return error
    return RowError(
        "QC-DATA-040",
        "cannot be served: the chat template refuses the messages up to this turn",
        at=f"messages[{turn.index}]",
        found=error.found or error.what,
        fix='mark the turn with "train": false, or set history=as_rendered',
    )


def _other_context(
    plan: RowPlan, turn: TrainedTurn, text: str, prompt: str, place: Turn
) -> RowError:
    """The error of a turn whose rendering does not begin with the prompt that serving shows."""
    what, fix = "is rendered in another context than serving shows", (
        "set history=as_rendered to train the row as the template renders it"
    )  # fmt: skip
    at = first_difference(text, prompt)
    if at >= place.body:
        what = "is rendered in another mode of thinking than serving prompts for"
        fix = plan.mode_advice(turn)
        at = place.body
    return RowError(
        "QC-DATA-041",
        what,
        at=f"messages[{turn.index}]",
        found=repr(text[max(0, at - 20) : at + 20]),
        expected=repr(prompt[max(0, at - 20) : at + 20]),
        fix=fix,
    )


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Where two sequences begin to differ: the length of the shorter one if it begins the other."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def lay_out(draft: Draft, text: str, plan: RowPlan, chat_format: ChatFormat) -> tuple[Span, ...]:
    """The spans of a sample's final text.

    Args:
        draft: the sample.
        text: its text, normalized and with expanded media.
        plan: of its row.
        chat_format: the format of `text`.

    Raises:
        RowError: as `turns_of` and `check_count`.
    """
    messages = plan.row.messages[: draft.count]
    answers = [n for n, m in enumerate(messages) if m["role"] == chat_format.assistant]
    turns = draft.parsed if text == draft.text else tuple(turns_of(text, chat_format))
    check_count(turns, chat_format, len(answers))
    spans: list[Span] = []
    indexes, at = iter(answers), 0

    def put(end: int, why: str, trained: bool = False) -> None:
        nonlocal at
        if end > at:
            spans.append(Span(start=at, end=end, why=why, trained=trained))
            at = end

    reasoned = {turn.index: turn.reasoned for turn in plan.turns}
    for turn in turns:
        put(turn.start, "template")
        if turn.role != chat_format.assistant:
            put(turn.end, f"{turn.role} turn" if turn.role else "turn")
            continue
        index = next(indexes)
        if index not in draft.tails:
            put(turn.end, f"assistant turn, not trained: {draft.whys[index]}")
            continue
        reply = min(turn.body + len(draft.tails[index]), turn.end)
        put(reply, PROMPT)
        if reasoned[index]:
            mask = plan.policies.reasoning == MASK
            put(
                block_end(text, reply, turn.end, chat_format),
                "reasoning, not trained: reasoning=mask" if mask else "reasoning",
                trained=not mask,
            )
        put(max(at, turn.end - len(chat_format.turn_end)), "answer", trained=True)
        put(turn.end, END_OF_TURN, trained=True)
    put(len(text), "template")
    return tuple(spans)
