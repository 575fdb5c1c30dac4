"""Turns of a rendered conversation: where each begins, and where its trained text begins and ends.

This file decides how a rendering is cut into turns. Text of a row cannot contain the control
strings of the chat format (`qcore.data.rows` refuses it), so every one of them was written by the
template. `qcore.data.rendering.samples` decides which turns are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ...api.media import RowError
from ...api.records import ChatFormat


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a rendering, in characters.

    Attributes:
        role: as the template wrote it.
        start: of the turn.
        body: after the role.
        reply: after the longest prompt tail; of another role than the assistant's: `body`.
        end: after the end-of-turn token; where the text has none, its end.
    """

    role: str
    start: int
    body: int
    reply: int
    end: int


def turns_of(text: str, chat_format: ChatFormat) -> Iterator[Turn]:
    """Yield the turns of a rendering, in order.

    Raises:
        RowError: ``QC-MASK-002`` an assistant turn does not end before the next one starts.
    """
    opens, closes = chat_format.turn_start, chat_format.turn_end
    tails = sorted(chat_format.prompt_tails, key=len, reverse=True)
    header = opens + chat_format.assistant + chat_format.role_end
    start = text.find(opens)
    while start >= 0:
        ours = text.startswith(header, start)
        body = start + len(header) if ours else _after_role(text, start, chat_format)
        end, following = text.find(closes, body), text.find(opens, body)
        if end < 0 or 0 <= following < end:
            if ours:
                raise RowError(
                    "QC-MASK-002",
                    f"renders an assistant turn without {closes!r}",
                    found=repr(text[start : start + 60]),
                )
            end = len(text) if following < 0 else following
            closed = end
        else:
            closed = end + len(closes)
        reply = body
        if ours:
            tail = next((tail for tail in tails if text.startswith(tail, body)), "")
            # A tail that reaches past the end does not belong to this turn.
            reply = min(body + len(tail), end)
        role = text[start + len(opens) : body].removesuffix(chat_format.role_end)
        yield Turn(role, start, body, reply, closed)
        start = following if closed <= following else text.find(opens, closed)


def assistant_turns(text: str, chat_format: ChatFormat, expected: int) -> list[Turn]:
    """The assistant's turns of a rendering.

    Raises:
        RowError: ``QC-MASK-001`` not as many as expected; as `turns_of`.
    """
    return check_count(turns_of(text, chat_format), chat_format, expected)


def check_count(turns: Iterable[Turn], chat_format: ChatFormat, expected: int) -> list[Turn]:
    """The assistant's turns among some turns.

    Raises:
        RowError: ``QC-MASK-001`` not as many as expected.
    """
    found = [turn for turn in turns if turn.role == chat_format.assistant]
    if len(found) != expected:
        raise RowError(
            "QC-MASK-001",
            "renders to a different number of assistant turns",
            found=len(found),
            expected=expected,
            fix="check the chat template against the chat format of the plugin",
        )
    return found


def _after_role(text: str, start: int, chat_format: ChatFormat) -> int:
    """Position after the role of a turn that is not the assistant's."""
    opened = start + len(chat_format.turn_start)
    if not chat_format.role_end:
        return opened
    ends = text.find(chat_format.role_end, opened)
    if ends < 0:
        return opened
    for word in (chat_format.turn_end, chat_format.turn_start):
        if text.find(word, opened, ends + len(word) - 1) >= 0:  # it begins before the role ends
            return opened
    return ends + len(chat_format.role_end)
