"""The think block of an assistant's turn: its tags, its text, and where a rendered one ends.

This file decides what a think block in ``content`` is: an opening tag at the start of the text,
which may be absent, and one closing tag. Templates cut, move or repeat anything else, which
`qcore.data.rows` therefore refuses. Whether a block is moved into ``reasoning_content`` is decided
by `qcore.data.repairs.text`, whether it is trained by `qcore.data.rendering.samples`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ..api.records import ChatFormat
from .content import text_of

Marks = tuple[str, str]  #: the tags that open and close a block
KEY = "reasoning_content"


def thinking_marks(chat_format: ChatFormat) -> Marks | None:
    """The tags of a think block, taken from the prompt tails; ``None`` without one."""
    return _marks_of(tuple(chat_format.prompt_tails))


@cache
def _marks_of(prompt_tails: tuple[str, ...]) -> Marks | None:
    tails = sorted((tail.strip() for tail in prompt_tails if tail.strip()), key=len)
    if len(tails) < 2 or not tails[-1].startswith(tails[0]):
        return None
    return tails[0], tails[-1].removeprefix(tails[0]).strip()


def has_marks(text: str, marks: Marks) -> bool:
    """Whether a text has a tag of a think block anywhere."""
    return marks[0] in text or marks[1] in text


def block_fault(text: str, marks: Marks) -> str:
    """What is wrong with the think block of a text; empty for a whole one at its start."""
    opens, closes = marks
    if text.count(closes) != 1 or text.count(opens) > 1:
        return f"has a think block that is not one {opens} and one {closes}"
    head = text.partition(closes)[0]
    if opens in text and not head.lstrip().startswith(opens):
        return f"has text before {opens}, which the template drops"
    return ""


def split_block(text: str, marks: Marks | None) -> tuple[str, str] | None:
    """Reasoning and the rest of a text with a think block; ``None`` for any other text."""
    if marks is None or marks[1] not in text or block_fault(text, marks):
        return None
    head, _, rest = text.partition(marks[1])
    return head.lstrip().removeprefix(marks[0]).strip("\n"), rest.lstrip("\n")


def without_tags(text: str, marks: Marks) -> str:
    """A text without the tags of its think block."""
    for mark in marks:
        text = text.replace(mark, "\n", 1)
    return text


def reasoning_of(message: Mapping[str, Any], chat_format: ChatFormat) -> str:
    """The reasoning of a checked assistant message, as a key or as a block in its content."""
    reasoning = message.get(KEY)
    if reasoning is not None:
        return str(reasoning)
    split = split_block(text_of(message.get("content", "")), thinking_marks(chat_format))
    return "" if split is None else split[0]


def without_reasoning(message: Mapping[str, Any], chat_format: ChatFormat) -> dict[str, Any]:
    """A checked assistant message of text without its reasoning."""
    bare = {key: value for key, value in message.items() if key != KEY}
    content = message.get("content", "")
    split = split_block(text_of(content), thinking_marks(chat_format))
    if split is not None and (
        isinstance(content, str) or all(p["type"] == "text" for p in content)
    ):
        bare["content"] = split[1]
    return bare


def block_end(text: str, reply: int, end: int, chat_format: ChatFormat) -> int:
    """Position after the think block of a rendered turn; `reply` where it has none.

    Args:
        text: the rendering.
        reply: where the reply begins, inside the block or before it.
        end: where the turn ends.
        chat_format: the format of `text`.
    """
    marks = thinking_marks(chat_format)
    if marks is None:
        return reply
    closes = text.find(marks[1], reply, end)
    if closes < 0:
        return reply
    # What separates the block from the answer is in the tail of an empty block.
    longest = max(chat_format.prompt_tails, key=len)
    gap = longest.partition(marks[1])[2]
    after = closes + len(marks[1])
    return after + len(gap) if text.startswith(gap, after) else after
