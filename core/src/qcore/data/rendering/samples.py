"""Samples of a row: which renderings of a conversation are trained, and which characters of them.

This file decides how many samples a row becomes and which of their characters are supervised.

With ``history=as_served`` a turn is trained in the context that serving gives it: the prompt that
the template renders of the messages before it. A turn whose context is the beginning of a sample
of a later turn is trained in that sample; the others get a sample of their own, because templates
change the history and drop the reasoning of earlier turns. With ``history=as_rendered`` a
row is one sample, whatever the template makes of its history.

Trained is, in every trained turn, what follows the prompt (`Turn.reply`), through the end-of-turn
token. `qcore.data.rendering.row_plan` chooses the trained turns, `qcore.checkpoint.chat_template`
renders, `qcore.data.rendering.masking` turns characters into tokens.

Codes: ``QC-DATA-040`` a turn that the template cannot serve, ``-041`` a turn that serving shows in
another context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...api.media import RowError
from ...api.records import ChatFormat
from ...errors import InputError
from ..policies import AS_RENDERED, MASK
from ..rows import thinking_marks
from .row_plan import RowPlan, TrainedTurn
from .turns import Turn, assistant_turns, check_count, turns_of

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
class Sample:
    """One rendering of a row.

    Attributes:
        sample: number within the row, from 1.
        text: the rendered conversation.
        spans: consecutive ranges that cover `text`.
        turns: indexes of the messages that are trained.
    """

    sample: int
    text: str
    spans: tuple[Span, ...]
    turns: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A sample before its text is final: media are expanded and spans laid out later.

    Attributes:
        sample: number within the row, from 1.
        text: as the template rendered it.
        count: number of messages in it.
        turns: indexes of the messages that are trained.
        whys: by index of an assistant message that is not trained here: the reason.
        other_prompt: indexes of trained messages that serving prompts with another tail.
    """

    sample: int
    text: str
    count: int
    turns: tuple[int, ...]
    other_prompt: tuple[int, ...] = ()
    whys: Mapping[int, str] = field(default_factory=dict)


def drafts(
    plan: RowPlan, texts: Sequence[str | InputError], chat_format: ChatFormat
) -> list[Draft]:
    """The samples of a row, from the renderings that its plan asks for.

    Args:
        plan: of the row.
        texts: one for each of `RowPlan.prefixes`.
        chat_format: the format of `texts`.

    Raises:
        RowError: ``QC-MASK-001``, ``-002`` as in `assistant_turns`, ``QC-DATA-040``, ``-041``.
        InputError: the template refuses the row.
    """
    if plan.policies.history == AS_RENDERED:
        (text,) = texts
        if isinstance(text, InputError):
            raise text
        turns = tuple(turn.index for turn in plan.turns)
        count = len(plan.row.messages)
        return [Draft(sample=1, text=text, count=count, turns=turns, whys=plan.untrained)]
    other: set[int] = set()
    served = _served(plan, texts, chat_format, other)
    groups: list[tuple[str, list[int]]] = []
    for turn, text in zip(reversed(plan.turns), reversed(served), strict=True):
        whole = text[: text.rfind(chat_format.turn_end) + len(chat_format.turn_end)]
        mine = next((found for full, found in groups if full.startswith(whole)), None)
        if mine is None:
            groups.append((text, [turn.index]))
        else:
            mine.insert(0, turn.index)
    groups.reverse()
    number = {index: at for at, (_, found) in enumerate(groups, 1) for index in found}
    return [
        Draft(
            sample=at,
            text=text,
            count=found[-1] + 1,
            turns=tuple(found),
            other_prompt=tuple(n for n in found if n in other),
            whys={n: f"history, trained in sample {k}" for n, k in number.items() if k != at}
            | dict(plan.untrained),
        )
        for at, (text, found) in enumerate(groups, 1)
    ]


def _served(
    plan: RowPlan,
    texts: Sequence[str | InputError],
    chat_format: ChatFormat,
    other: set[int],
) -> list[str]:
    """The rendering of each trained turn, proved to begin with its served prompt.

    Adds to `other` the turns whose prompt ends in another tail.
    """
    served = []
    for at, turn in enumerate(plan.turns):
        text, prompt = texts[2 * at], texts[2 * at + 1]
        for made in (text, prompt):
            if isinstance(made, InputError):
                raise _not_served(plan, turn, made)
        assert isinstance(text, str)
        assert isinstance(prompt, str)
        if not _begins_with(plan, turn, text, prompt, chat_format):
            other.add(turn.index)
        served.append(text)
    return served


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


def _begins_with(
    plan: RowPlan, turn: TrainedTurn, text: str, prompt: str, chat_format: ChatFormat
) -> bool:
    """Whether a turn's rendering begins with the prompt that serving shows.

    False where only the prompt's tail differs: the user set the thinking mode, or the template has
    one mode only.

    Raises:
        RowError: ``QC-DATA-041`` what precedes the turn differs.
    """
    said = sum(m["role"] == chat_format.assistant for m in plan.row.messages[: turn.index + 1])
    place = assistant_turns(text, chat_format, said)[-1]
    head = text[: place.body]
    if prompt.startswith(head) and prompt[len(head) :] in ("", *chat_format.prompt_tails):
        return len(prompt) == place.reply
    at = next((n for n, (a, b) in enumerate(zip(head, prompt, strict=False)) if a != b), len(head))
    raise RowError(
        "QC-DATA-041",
        "is rendered in another context than serving shows",
        at=f"messages[{turn.index}]",
        found=repr(head[max(0, at - 20) : at + 20]),
        expected=repr(prompt[max(0, at - 20) : at + 20]),
        fix="set history=as_rendered to train the row as the template renders it",
    )


def lay_out(draft: Draft, text: str, plan: RowPlan, chat_format: ChatFormat) -> tuple[Span, ...]:
    """The spans of a sample's final text.

    Args:
        draft: the sample.
        text: its text, normalized and with expanded media.
        plan: of its row.
        chat_format: the format of `text`.

    Raises:
        RowError: as `assistant_turns`.
    """
    messages = plan.row.messages[: draft.count]
    said = [n for n, m in enumerate(messages) if m["role"] == chat_format.assistant]
    turns = list(turns_of(text, chat_format))
    check_count(turns, chat_format, len(said))
    spans: list[Span] = []
    indexes, at = iter(said), 0

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
        if index not in draft.turns:
            put(turn.end, f"assistant turn, not trained: {draft.whys[index]}")
            continue
        put(turn.reply, "prompt")
        if reasoned[index]:
            mask = plan.policies.reasoning == MASK
            put(
                _after_reasoning(text, turn, chat_format),
                "reasoning, not trained: reasoning=mask" if mask else "reasoning",
                trained=not mask,
            )
        put(max(at, turn.end - len(chat_format.turn_end)), "answer", trained=True)
        put(turn.end, END_OF_TURN, trained=True)
    put(len(text), "template")
    return tuple(spans)


def _after_reasoning(text: str, turn: Turn, chat_format: ChatFormat) -> int:
    """Position after the think block of a turn; its reply where the block is not rendered."""
    marks = thinking_marks(chat_format)
    if marks is None:
        return turn.reply
    closes = text.find(marks[1], turn.reply, turn.end)
    if closes < 0:
        return turn.reply
    # What separates the block from the answer is in the tail of an empty block.
    longest = max(chat_format.prompt_tails, key=len)
    gap = longest.partition(marks[1])[2]
    after = closes + len(marks[1])
    return after + len(gap) if text.startswith(gap, after) else after
