"""Samples that are longer than ``max_length``: refused, dropped, or cut.

This file decides what ``long_rows`` means. ``truncate_turns`` cuts after the last trained turn
that fits, so that every turn that is left is whole and has its context; ``truncate_tokens`` cuts
at ``max_length``. A sample of which nothing trained fits is left out, and so is a row without
samples. `qcore.data.policies` lists the policies.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...api.media import RowError
from ..media.spans import place
from ..policies import DROP_ROWS, REFUSE, TRUNCATE_TURNS
from .masking import IGNORED, Encoded, Example, control_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from ...api.media import MediaReader, Medium, Placed


def too_long(encoded: Sequence[Encoded], max_length: int) -> RowError:
    """The error of a row whose longest sample has more than `max_length` tokens.

    `Rejects.add_too_long` completes the fix once all rows are known.
    """
    longest = max((one.example for one in encoded), key=lambda example: len(example.ids))
    media = sum(medium.tokens for medium in longest.media)
    many = f", sample {longest.sample}" if len(encoded) > 1 else ""
    return RowError(
        "QC-DATA-011",
        "is longer than max_length",
        found=f"{len(longest.ids)} tokens" + (f", {media} of them media" if media else "") + many,
        expected=f"at most {max_length}",
        fix="make its media smaller" if media else None,
    )


def fitted(
    encoded: Sequence[Encoded],
    max_length: int,
    policy: str,
    tokenizer: Tokenizer,
    reader: MediaReader | None = None,
) -> list[Encoded]:
    """The samples of a row as they are trained; empty if the row is left out.

    Args:
        encoded: samples of the row.
        max_length: maximum tokens of a sample.
        policy: ``long_rows``.
        tokenizer: of the samples.
        reader: of their media.

    Raises:
        RowError: ``QC-DATA-011`` with ``long_rows=refuse``.
    """
    if all(len(one.example.ids) <= max_length for one in encoded):
        return list(encoded)
    if policy == REFUSE:
        raise too_long(encoded, max_length)
    if policy == DROP_ROWS:
        return []
    kept = []
    for one in encoded:
        length = len(one.example.ids)
        if length > max_length:
            ends = [end for end in one.ends if end <= max_length]
            length = max_length if policy != TRUNCATE_TURNS else max(ends, default=0)
        example = _cut(one, length, tokenizer, reader)
        if example is not None:
            kept.append(replace(one, example=example))
    return kept


def _cut(
    one: Encoded, length: int, tokenizer: Tokenizer, reader: MediaReader | None
) -> Example | None:
    """The first `length` tokens of a sample; ``None`` if nothing in them is supervised."""
    example = one.example
    if length == len(example.ids):
        return example
    ids, labels = example.ids[:length], example.labels[:length]
    supervised = len(labels) - 1 - labels[1:].count(IGNORED)
    if supervised < 1:
        return None
    whole = sum(end <= length for end in one.ends)
    media, placed = example.media, example.placed
    if media and placed is not None and reader is not None:
        media = _whole(media, placed, length)
        if any(id_ in control_ids(tokenizer, reader) for id_ in ids) or media:
            if _positions(media) != sum(at < length for at in placed.where):
                return None  # the cut goes through a medium
            placed = place(reader, media, ids, control_ids(tokenizer, reader)) if media else None
        else:
            placed = None
    return replace(
        example,
        ids=array("i", ids),
        labels=array("i", labels),
        supervised=supervised,
        turns=max(1, whole),
        reasoned=sum(one.reasoned[: max(1, whole)]),
        media=media,
        placed=placed,
        payloads=example.payloads[: len(media)],
        token_spans=tuple(
            replace(span, end=min(span.end, length))
            for span in example.token_spans
            if span.start < length
        ),
    )


def _positions(media: Sequence[Medium]) -> int:
    return sum(medium.tokens for medium in media)


def _whole(media: tuple[Medium, ...], placed: Placed, length: int) -> tuple[Medium, ...]:
    """The media that lie in the first `length` tokens."""
    at, kept = 0, []
    for medium in media:
        at += medium.tokens
        if placed.where[at - 1] >= length:
            break
        kept.append(medium)
    return tuple(kept)
