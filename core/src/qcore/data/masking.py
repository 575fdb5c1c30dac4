"""Loss masking: which tokens of a rendered conversation are supervised.

This file decides the labels. Trained spans are located in the *rendered* text, because templates
trim, move and drop text: in every assistant turn, from after the prompt tail (what inference
prefills) through the end-of-turn token. So ``<think>`` in the prompt and an empty think block are
context; an answer and its end are trained; prompts, tool results and the newline between turns are
not. Placeholders of media are never trained (`qcore.data.media_spans`). `qcore.data.rows` checks
rows, `qcore.data.dataset` runs the steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..api.media import RowError
from ..api.records import ChatFormat
from .media_spans import less_media, place

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ..api.media import MediaReader, Medium, Placed
    from .rows import ChatRow

IGNORED = -100  #: label of an unsupervised position, as in transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One tokenized row. `ids` and `labels` are 32-bit integers of equal length.

    Attributes:
        ids: token ids.
        labels: the ids of trained positions, else `IGNORED`; not shifted.
        line: line number in the file.
        turns: number of assistant turns.
        supervised: positions with a loss; the first token has none, because it has no context.
        media: its media, in order; empty for text.
        placed: the positions of media among the tokens; ``None`` for text.
    """

    ids: array[int]
    labels: array[int]
    line: int
    turns: int
    supervised: int
    media: tuple[Medium, ...] = ()
    placed: Placed | None = None


def highest_id(tokenizer: Tokenizer) -> int:
    """The highest token id of the tokenizer."""
    added = tokenizer.get_added_tokens_decoder()
    return max(tokenizer.get_vocab_size(with_added_tokens=False) - 1, *added, -1)


def normalised(text: str, tokenizer: Tokenizer) -> str:
    """Apply the tokenizer's NFC normalization, so that offsets refer to the returned text."""
    normaliser = tokenizer.normalizer
    if normaliser is None or type(normaliser).__name__ != "NFC" or text.isascii():
        return text
    done: str = normaliser.normalize_str(text)
    return done


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
    header = chat_format.turn_start + chat_format.assistant + chat_format.role_end
    tails = sorted(chat_format.prompt_tails, key=len, reverse=True)
    found: list[tuple[int, int]] = []
    at = text.find(header)
    while at >= 0:
        body = at + len(header)
        end = text.find(chat_format.turn_end, body)
        following = text.find(chat_format.turn_start, body)
        if end < 0 or 0 <= following < end:
            raise RowError(
                "QC-MASK-002",
                f"renders an assistant turn without {chat_format.turn_end!r}",
                found=repr(text[at : at + 60]),
            )
        tail = next((tail for tail in tails if text.startswith(tail, body)), "")
        # A tail that reaches past the end does not belong to this turn.
        start = min(body + len(tail), end)
        end += len(chat_format.turn_end)
        found.append((start, end))
        at = text.find(header, end)
    if len(found) != expected_turns:
        raise RowError(
            "QC-MASK-001",
            "renders to a different number of assistant turns",
            found=len(found),
            expected=expected_turns,
            fix="check the chat template against the chat format of the plugin",
        )
    return found


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
    made = array("i", [IGNORED]) * len(ids)
    ranges = iter(trained)
    current = next(ranges, None)
    for index, (start, _) in enumerate(offsets):
        while current is not None and start >= current[1]:
            current = next(ranges, None)
        if current is None:
            break
        if start >= current[0]:
            made[index] = ids[index]
    return made


def encode_text(
    text: str,
    row: ChatRow,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    max_length: int,
    *,
    reader: MediaReader | None = None,
) -> Example:
    """Tokenize and mask a rendered row.

    Args:
        text: the rendered row.
        row: the row, with its media already read.
        tokenizer: from `load_tokenizer`.
        chat_format: the format of `text`.
        max_length: maximum tokens; a longer row is an error and never truncated.
        reader: reads media; without it the row is text only.

    Raises:
        RowError: ``QC-MASK-001``, ``-002`` as in `spans`, ``-004`` as in `place`,
            ``QC-DATA-011`` too long, ``QC-DATA-012`` no supervised tokens; or as
            `MediaReader.expand`.
    """
    turns = row.turns(chat_format.assistant)
    text, trained = _trained_spans(normalised(text, tokenizer), row, chat_format, turns, reader)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ids = array("i", encoding.ids)
    _check_length(ids, row, max_length)
    made = labels(ids, encoding.offsets, trained)
    placed = None if reader is None else _mask_media(made, ids, row, tokenizer, reader)
    supervised = len(made) - 1 - made[1:].count(IGNORED)
    if supervised < 1:
        raise RowError(
            "QC-DATA-012",
            "has no supervised tokens (every label is -100)",
            expected="text in at least one assistant turn",
            fix="remove the row",
        )
    return Example(
        ids=ids,
        labels=made,
        line=row.line,
        turns=turns,
        supervised=supervised,
        media=row.seen,
        placed=placed,
    )


def _trained_spans(
    text: str, row: ChatRow, chat_format: ChatFormat, turns: int, reader: MediaReader | None
) -> tuple[str, list[tuple[int, int]]]:
    """Expand the media of a rendered text and locate its trained ranges."""
    trained = spans(text, chat_format, turns)
    if reader is None:
        return text, trained
    expanded = reader.expand(text, row.seen)
    inside, trained = trained, spans(expanded, chat_format, turns)
    if row.seen:
        trained = less_media(trained, text, inside, row.seen, reader)
    return expanded, trained


def _mask_media(
    made: array[int], ids: array[int], row: ChatRow, tokenizer: Tokenizer, reader: MediaReader
) -> Placed | None:
    """Mask the placeholders of media in `made`; return the positions of the row's media."""
    control = frozenset(tokenizer.token_to_id(token) for token in reader.control)
    for index, id_ in enumerate(ids):
        if id_ in control:
            made[index] = IGNORED
    return place(reader, row.seen, ids, control) if row.seen else None


def _check_length(ids: array[int], row: ChatRow, max_length: int) -> None:
    if len(ids) > max_length:
        media = sum(medium.tokens for medium in row.seen)
        smaller = ", shorten the row or make its media smaller" if media else " or shorten the row"
        raise RowError(
            "QC-DATA-011",
            "is longer than max_length",
            found=f"{len(ids)} tokens" + (f", {media} of them media" if media else ""),
            expected=f"at most {max_length}",
            fix=f"raise max_length{smaller}",
        )


def trained_text(text: str, trained: Iterable[tuple[int, int]]) -> str:
    """Concatenate the trained ranges of a rendered text."""
    return "".join(text[start:end] for start, end in trained)
