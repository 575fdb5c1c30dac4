"""Samples of a row: which renderings of a conversation are trained, and which characters of them.

This file decides how many samples a row becomes and which of their characters are supervised.
`qcore.data.masking` turns characters into tokens.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A range of a sample and why it is trained or not.

    `start` and `end` are characters of the sample's text; `qcore.data.masking` gives the same
    spans in tokens.

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
