"""Loss masking: which tokens of a sample are supervised.

This file decides the labels. Trained spans are characters of the *rendered* text
(`qcore.data.rendering.samples`), because templates trim, move and drop text; a token is trained if
it starts in a trained span. Placeholders of media are never trained (`qcore.data.media.spans`).
`qcore.data.rows` checks rows, `qcore.data.dataset` runs the steps.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...api.media import RowError
from ...api.records import ChatFormat
from ..media.spans import less_media, place
from ..policies import AS_RENDERED
from .pieces import PieceEncoder, Tokens, normalized
from .row_plan import RowPlan, own_variables
from .samples import END_OF_TURN, PROMPT, Draft, Span, lay_out
from .turns import assistant_turns

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ...api.media import MediaReader, Medium, Payload, Placed

IGNORED = -100  #: label of an unsupervised position, as in transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One tokenized sample. `ids` and `labels` are 32-bit integers of equal length.

    Attributes:
        ids: token ids.
        labels: the ids of trained positions, else `IGNORED`; not shifted.
        line: line of its row in the file.
        turns: number of trained turns.
        supervised: positions with a loss; the first token has none, because it has no context.
        media: its media, in order; empty for text.
        placed: the positions of media among the tokens; ``None`` for text.
        row: number of its row over all sources, from 1.
        sample: number within the row, from 1.
        reasoned: number of trained turns with reasoning.
        variables: its row's own ``chat_template_kwargs`` as JSON; empty without them.
        token_spans: consecutive ranges of its tokens with the reason of each; empty unless
            `encode_sample` is asked to explain.
        payloads: where to read each of `media` again, without the bytes of rows.
    """

    ids: array[int]
    labels: array[int]
    line: int
    turns: int
    supervised: int
    media: tuple[Medium, ...] = ()
    placed: Placed | None = None
    row: int = 0
    sample: int = 1
    reasoned: int = 0
    variables: str = ""
    token_spans: tuple[Span, ...] = ()
    payloads: tuple[Payload, ...] = field(default=(), compare=False)

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.ids)


def highest_id(tokenizer: Tokenizer) -> int:
    """The highest token id of the tokenizer."""
    added = tokenizer.get_added_tokens_decoder()
    return max(tokenizer.get_vocab_size(with_added_tokens=False) - 1, *added, -1)


def spans(text: str, chat_format: ChatFormat, expected_turns: int) -> list[tuple[int, int]]:
    """Locate the trained character ranges of a rendered conversation, in order.

    Args:
        text: the rendered conversation.
        chat_format: its format.
        expected_turns: assistant turns of the row.

    Returns:
        ``(start, end)`` per turn: from after the header and the longest matching prompt tail
        through the end-of-turn token.

    Raises:
        RowError: ``QC-MASK-001`` the number of turns differs from the row's, ``QC-MASK-002`` a
            turn does not end before the next one starts.
    """
    turns = assistant_turns(text, chat_format, expected_turns)
    return [(turn.reply, turn.end) for turn in turns]


def labels(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    trained: Sequence[tuple[int, int]],
) -> array[int]:
    """Labels aligned with `ids`: the id if a token starts inside a trained range.

    Tokens that are bytes of one character share its offsets, so all or none of them are trained.
    A token that straddles the start of a range is not trained, because part of it is prompt; one
    that straddles the end is, because the model has to produce it.

    Args:
        ids: token ids.
        offsets: ``(start, end)`` in characters, one per token, not decreasing.
        trained: ranges in order, from `spans`.
    """
    starts = [start for start, _ in offsets]
    return _marked(array("i", ids), trained, lambda at: bisect_left(starts, at))


def _marked(
    ids: array[int], trained: Iterable[tuple[int, int]], index: Callable[[int], int]
) -> array[int]:
    """As `labels`; `index` gives the number of tokens that start before a character."""
    made = array("i", [IGNORED]) * len(ids)
    for start, end in trained:
        first, last = index(start), index(end)
        made[first:last] = ids[first:last]
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A sample as tokens, before it is made to fit.

    Attributes:
        example: the whole sample.
        text: the final text.
        char_spans: consecutive ranges of its characters with the reason of each.
        turns: indexes of the messages that are trained.
        ends: for each trained turn, the number of tokens through its end.
        reasoned: for each trained turn, whether it has reasoning.
    """

    example: Example
    text: str
    char_spans: tuple[Span, ...]
    turns: tuple[int, ...]
    ends: tuple[int, ...]
    reasoned: tuple[bool, ...]


def encode_sample(
    draft: Draft,
    plan: RowPlan,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    *,
    pieces: PieceEncoder,
    reader: MediaReader | None = None,
    explain: bool = False,
) -> Encoded:
    """Tokenize and mask a sample.

    Args:
        draft: the sample.
        plan: of its row, whose media are already read.
        tokenizer: from `load_tokenizer`.
        chat_format: the format of the sample's text.
        pieces: encodes the text.
        reader: reads media; without it the row is text only.
        explain: whether the example keeps its spans.

    Raises:
        RowError: ``QC-MASK-001``, ``-002`` as in `assistant_turns`, ``-004`` as in `place`,
            ``QC-DATA-012`` no supervised tokens; or as `MediaReader.expand`.
    """
    seen = zip(plan.row.media_at, plan.row.seen, strict=True)
    media = tuple(medium for at, medium in seen if at < draft.count)
    text, spans_, trained = _laid_out(draft, plan, tokenizer, chat_format, media, reader)
    tokens = _encoded(text, spans_, plan.policies.history, pieces)
    ids = tokens.ids
    made = _marked(ids, trained, tokens.index)
    placed = None if reader is None else _mask_media(made, ids, media, tokenizer, reader)
    reasoned = tuple(turn.reasoned for turn in plan.turns if turn.index in draft.turns)
    example = Example(
        ids=ids,
        labels=made,
        line=plan.row.line,
        turns=len(draft.turns),
        supervised=_supervised(made),
        media=media,
        placed=placed,
        row=plan.row.row,
        sample=draft.sample,
        reasoned=sum(reasoned),
        variables=own_variables(plan.row.variables),
        token_spans=tuple(token_spans(spans_, tokens.offsets(), made)) if explain else (),
        payloads=plan.row.payloads[: len(media)],
    )
    ends = [span.end for span in spans_ if span.trained and span.why == END_OF_TURN]
    # The token that ends a turn is the last one that starts before the end.
    return Encoded(
        example=_checked(example),
        text=text,
        char_spans=spans_,
        turns=draft.turns,
        ends=tuple(map(tokens.index, ends)),
        reasoned=reasoned,
    )


def _encoded(text: str, spans_: Sequence[Span], history: str, pieces: PieceEncoder) -> Tokens:
    """The tokens of a sample, whose last prompt is tokenized as it is served."""
    if history == AS_RENDERED:
        return pieces.encode(text)
    prompt = next(span for span in reversed(spans_) if span.why == PROMPT)
    return pieces.encode(text, (prompt.start, prompt.end))


def _laid_out(
    draft: Draft,
    plan: RowPlan,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    media: tuple[Medium, ...],
    reader: MediaReader | None,
) -> tuple[str, tuple[Span, ...], list[tuple[int, int]]]:
    """The final text of a sample, its spans, and its trained ranges without media."""
    text = normalized(draft.text, tokenizer)
    spans_ = lay_out(draft, text, plan, chat_format)
    trained = _ranges(spans_)
    if reader is None:
        return text, spans_, trained
    inside, expanded = trained, reader.expand(text, media)
    if expanded != text:
        spans_ = lay_out(draft, expanded, plan, chat_format)
        trained = _ranges(spans_)
    if media:
        trained = less_media(trained, text, inside, media, reader)
    return expanded, spans_, trained


def _ranges(spans_: Iterable[Span]) -> list[tuple[int, int]]:
    """The trained ranges of some spans; neighbors are joined."""
    found: list[tuple[int, int]] = []
    for span in spans_:
        if not span.trained:
            continue
        if found and found[-1][1] == span.start:
            found[-1] = found[-1][0], span.end
        else:
            found.append((span.start, span.end))
    return found


def _supervised(made: array[int]) -> int:
    return len(made) - 1 - made[1:].count(IGNORED)


def _checked(example: Example) -> Example:
    if example.supervised < 1:
        raise RowError(
            "QC-DATA-012",
            "has no supervised tokens (every label is -100)",
            expected="text in at least one assistant turn",
            fix="remove the row",
        )
    return example


def token_spans(
    spans_: Sequence[Span], offsets: Sequence[tuple[int, int]], made: Sequence[int]
) -> Iterator[Span]:
    """The spans of a sample in tokens, consecutive and covering all of them.

    A token belongs to the span in which it starts; one that is not trained although its span is
    (a placeholder of media, a token that straddles the start) is a span of its own.

    Args:
        spans_: spans in characters.
        offsets: characters of each token.
        made: labels of the tokens.
    """
    starts = [span.start for span in spans_]
    first, why, trained = 0, "", False
    for at, (start, _) in enumerate(offsets):
        span = spans_[max(0, bisect_right(starts, start) - 1)]
        labeled = made[at] != IGNORED
        reason = span.why if labeled == span.trained else "media or part of the prompt"
        if at and (reason, labeled) != (why, trained):
            yield Span(start=first, end=at, why=why, trained=trained)
            first = at
        why, trained = reason, labeled
    if len(offsets):
        yield Span(start=first, end=len(offsets), why=why, trained=trained)


def _mask_media(
    made: array[int],
    ids: array[int],
    media: tuple[Medium, ...],
    tokenizer: Tokenizer,
    reader: MediaReader,
) -> Placed | None:
    """Mask the placeholders of media in `made`; return the positions of the media."""
    control = control_ids(tokenizer, reader)
    if not control.isdisjoint(ids):
        for index, id_ in enumerate(ids):
            if id_ in control:
                made[index] = IGNORED
    return place(reader, media, ids, control) if media else None


def control_ids(tokenizer: Tokenizer, reader: MediaReader) -> frozenset[int | None]:
    """Token ids of the placeholders that a reader writes."""
    return frozenset(tokenizer.token_to_id(token) for token in reader.control)


def trained_text(text: str, trained: Iterable[tuple[int, int]]) -> str:
    """Concatenate the trained ranges of a rendered text."""
    return "".join(text[start:end] for start, end in trained)
