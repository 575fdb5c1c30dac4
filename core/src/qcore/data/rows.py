"""Chat rows: canonical rows are checked and normalized to messages and tools for a template.

This file decides which canonical rows are valid, and normalizes them so that a template gets the
same input as in serving:

- null keys of messages, text parts and tools are dropped, except ``default`` and ``const`` of
  tools, where null is a value (column formats fill in nulls, which templates render as ``None`` or
  mistake for media);
- tool arguments in a JSON string become a mapping; "" and null become ``{}``;
- a media part keeps only its kind; its path or data URL is kept beside the messages;
- ``train`` marks are kept beside the messages too, which a template renders.

Everything else is refused: other spellings are read by `qcore.data.formats`, which makes the
canonical row. So are control strings of the chat format in a row's text, which
would become control tokens. `qcore.data.reading` reads records, `qcore.data.content` checks
content parts, `qcore.checkpoint.chat_template` renders.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..api.media import RowError
from ..api.records import ChatFormat
from ..checkpoint.chat_template import STANDARD_INPUTS
from ..errors import nearest
from . import tool_fields as fields
from .content import ContentReader, text_of
from .think_block import block_fault, has_marks, thinking_marks, without_tags
from .tool_fields import kind, known_keys, mapping, without_nulls, wrong

if TYPE_CHECKING:
    from ..api.media import MediaReader, Medium, Payload
    from .media.files import Reference
    from .sources.source import Source

_ROW_KEYS = ("messages", "tools", "id", "metadata", "train", "chat_template_kwargs")
_KEYS = {
    "assistant": ("role", "content", "name", "tool_calls", "train", "reasoning_content"),
    "tool": ("role", "content", "name", "tool_call_id", "train"),
}
_OTHER_KEYS = ("role", "content", "name", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRow:
    """One normalized conversation.

    Attributes:
        line: line in the file, or number of the record, from 1.
        unit: what `line` counts; see `Record.unit`.
        messages: as a template reads them; must not be mutated.
        tools: function descriptions, or ``None``.
        media: references of its media parts, in order; empty once they are read.
        media_at: for each medium, the index of its message.
        seen: the media, once they are read.
        payloads: where to read each of `seen` again.
        train: for each message, the ``train`` mark that it has; empty: no message has one.
        trained: the ``train`` mark of the row.
        variables: the row's own ``chat_template_kwargs``.
        row: number over all sources, from 1.
        path: the file.
        source: where the row comes from.
        format: name of the row format that has read it.
    """

    line: int
    unit: str = "line"
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    media: tuple[Reference, ...] = ()
    media_at: tuple[int, ...] = ()
    seen: tuple[Medium, ...] = ()
    payloads: tuple[Payload, ...] = ()
    train: tuple[bool | None, ...] = ()
    trained: bool | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    row: int = 0
    path: Path | None = None
    source: Source | None = None
    format: str = ""

    def turns(self, role: str) -> int:
        """Number of messages with this role."""
        return sum(message["role"] == role for message in self.messages)


_ADDED = "; a token that you added must not be special (tokenizer.add_tokens) to be in rows"


class RowCheck:
    """Converts canonical rows to `ChatRow` by the rules of one chat format.

    Args:
        chat_format: the format of rendered conversations.
        control: further strings that a row's text must not hold.
        reader: reads media; without it rows must be text only.
        unread: why rows with media cannot be read.
        kinds: without a reader: kinds of media parts that rows may have all the same.
    """

    def __init__(
        self,
        chat_format: ChatFormat,
        control: Sequence[str] = (),
        reader: MediaReader | None = None,
        unread: str = "",
        kinds: Sequence[str] = (),
    ) -> None:
        self.format = chat_format
        self.marks = thinking_marks(chat_format)
        self.parts = ContentReader(reader, unread, kinds)
        media = () if reader is None else reader.control
        longest_first = sorted({*chat_format.control, *control, *media}, key=len, reverse=True)
        words = [re.escape(word) for word in longest_first if word]
        self._forbidden = re.compile("|".join([*words, "\0", "[\ud800-\udfff]"]))
        self._own = {*control} - {*chat_format.control, *media}
        self._starts = frozenset(word[0] for word in longest_first if word) | {"\0"}

    def __call__(self, line: int, value: Any) -> ChatRow:
        """Check and normalize one row.

        Raises:
            RowError: the first problem.
        """
        row = without_nulls(mapping(value, "", "QC-DATA-005", "is not an object"))
        known_keys(row, _ROW_KEYS, "", "QC-DATA-005", self.parts.row_advice)
        tools = fields.tools(row.get("tools"))
        media: list[Reference] = []
        media_at: list[int] = []
        messages = []
        for index, message in enumerate(self._messages(row, media)):
            messages.append(message)
            media_at += [index] * (len(media) - len(media_at))
        marks = tuple(self._mark(m, f"messages[{n}]") for n, m in enumerate(messages))
        self._check_order(messages)
        for index, message in enumerate(messages):
            self._check_message(message, f"messages[{index}]")
        if tools:
            self._check_text(tools, "tools")
        variables = _variables(row.get("chat_template_kwargs", {}))
        self._check_text(variables, "chat_template_kwargs")
        return ChatRow(
            line=line,
            messages=tuple(messages),
            tools=tools,
            media=tuple(media),
            media_at=tuple(media_at),
            train=marks if any(mark is not None for mark in marks) else (),
            trained=_boolean(row, ""),
            variables=variables,
        )

    def _mark(self, message: dict[str, Any], at: str) -> bool | None:
        """Take the ``train`` mark out of a message, which a template must not see."""
        mark = _boolean(message, at)
        message.pop("train", None)
        if mark and message["role"] != self.format.assistant:
            raise RowError(
                "QC-DATA-006",
                "marks a turn that is not the assistant's as trained",
                at=f"{at}.train",
                expected=f"false, or the role {self.format.assistant}",
                fix="leave the mark out: only assistant turns are trained",
            )
        return mark

    def _messages(self, row: dict[str, Any], media: list[Reference]) -> Iterator[dict[str, Any]]:
        if "messages" not in row:
            raise RowError("QC-DATA-005", "has no messages", expected='{"messages": [...]}')
        given = row["messages"]
        if not isinstance(given, list) or not given:
            raise RowError(
                "QC-DATA-005",
                "is not a list of messages",
                at="messages",
                found="an empty list" if given == [] else kind(given),
                expected="a list of at least one message",
            )
        for index, message in enumerate(given):
            yield self._message(message, f"messages[{index}]", media)

    def _message(self, value: Any, at: str, media: list[Reference]) -> dict[str, Any]:
        given = mapping(value, at, "QC-DATA-006", "is not an object")
        role = self._role(given, at)
        known = _KEYS.get("assistant" if role == self.format.assistant else role, _OTHER_KEYS)
        message = without_nulls(given)
        known_keys(message, known, at, "QC-DATA-006")
        for key in ("name", "tool_call_id"):
            if not isinstance(message.get(key, ""), str):
                raise wrong(message[key], f"{at}.{key}", "a string")
        if "content" in message:
            said, found = self.parts.content(message["content"], f"{at}.content")
            message["content"] = said
            media += found
            if found and role == "system":
                raise RowError(
                    "QC-DATA-006",
                    "is a media part in a system message, which allows text only",
                    at=found[0].at,
                    fix="put it into a user message",
                )
        elif role != self.format.assistant:
            raise RowError(
                "QC-DATA-006", "is missing", at=f"{at}.content", expected="text",
                fix='write the text; "" if there was none',
            )  # fmt: skip
        if role == self.format.assistant:
            self._assistant(message, at)
        return message

    def _role(self, message: Mapping[str, Any], at: str) -> str:
        role = message.get("role")
        if isinstance(role, str) and role in self.format.roles:
            return role
        advice = {"developer": "system", "function": "tool", "human": "user", "gpt": "assistant",
                  "model": "assistant", "bot": "assistant"}.get(str(role))  # fmt: skip
        meant = nearest(str(role).lower(), self.format.roles) or advice
        raise RowError(
            "QC-DATA-006",
            "unknown role" if isinstance(role, str) else "has no role",
            at=f"{at}.role" if "role" in message else at,
            found=repr(role)[:80] if "role" in message else None,
            expected=" or ".join(self.format.roles),
            fix=f'write "{meant}"' if meant in self.format.roles else None,
        )

    def _assistant(self, message: dict[str, Any], at: str) -> None:
        if not isinstance(message.get("reasoning_content", ""), str):
            at = f"{at}.reasoning_content"
            raise wrong(message["reasoning_content"], at, "a string")
        if "tool_calls" in message:
            calls = fields.calls(
                message["tool_calls"], f"{at}.tool_calls", self.format.parse_arguments
            )
            message["tool_calls"] = calls
            if not calls:
                del message["tool_calls"]
        said = text_of(message.get("content", "")).strip()
        reasoned = message.get("reasoning_content")
        if not (said or "tool_calls" in message or (reasoned and reasoned.strip())):
            raise RowError(
                "QC-DATA-010",
                "is empty",
                at=at,
                expected="content or tool_calls",
                fix="remove the turn",
            )
        self._check_thinking(said, reasoned, at)

    def _check_thinking(self, said: str, reasoned: str | None, at: str) -> None:
        """Refuse think blocks that a template would duplicate, cut or drop."""
        if self.marks is None:
            return
        opens, closes = self.marks
        where = f"{at}.content"
        if reasoned is not None and has_marks(reasoned, self.marks):
            what, where = f"contains {opens} or {closes}", f"{at}.reasoning_content"
            fix = "write the reasoning alone: the template adds the tags"
        elif not has_marks(said, self.marks):
            return
        elif reasoned is not None:
            what = f"contains {opens} or {closes} beside reasoning_content"
            fix = "keep one of them: reasoning_content, or the block in content"
        else:
            what = block_fault(said, self.marks)
            fix = "write the reasoning as reasoning_content and the answer alone as content"
            if not what:
                return
        raise RowError(
            "QC-DATA-016",
            what,
            at=where,
            expected=f"reasoning_content, or {opens}...{closes} at the start of content",
            fix=fix,
        )

    def _check_order(self, messages: Sequence[Mapping[str, Any]]) -> None:
        roles = [message["role"] for message in messages]
        if self.format.assistant not in roles:
            raise RowError(
                "QC-DATA-010",
                "has no assistant turn",
                at="messages",
                found=", ".join(dict.fromkeys(roles)),
                expected="at least one assistant turn",
            )
        for index, message in enumerate(messages):
            if message["role"] == "tool" and not (
                index
                and (roles[index - 1] == "tool" or "tool_calls" in messages[index - 1])
            ):  # fmt: skip
                raise RowError(
                    "QC-DATA-006",
                    "is a tool result without a preceding tool call",
                    at=f"messages[{index}]",
                    fix="put it after the assistant turn with the tool_calls",
                )

    def check_text(self, text: str, at: str) -> None:
        """Check a text that is not part of a row, such as a prompt.

        Raises:
            RowError: ``QC-DATA-008``.
        """
        self._check_string(text, at)

    def _check_message(self, message: dict[str, Any], at: str) -> None:
        if self.marks is not None and message["role"] == self.format.assistant:
            said = without_tags(text_of(message.get("content", "")), self.marks)
            message = {**message, "content": said}
        self._check_text(message, at)

    def _check_text(self, value: Any, at: str) -> None:
        """Refuse control strings, NUL and lone surrogates anywhere in `value`."""
        if isinstance(value, str):
            self._check_string(value, at)
        elif isinstance(value, dict):
            for key, item in value.items():
                self._check_string(key, at)
                self._check_text(item, f"{at}.{key}")
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                self._check_text(item, f"{at}[{index}]")

    def _check_string(self, text: str, at: str) -> None:
        # The tokenizer applies NFC first, which must not create a control string.
        normal = text.isascii() or unicodedata.is_normalized("NFC", text)
        if normal and not any(map(text.__contains__, self._starts)) and _has_characters(text):
            return  # what most texts take, in a tenth of the time of the search
        hit = self._forbidden.search(text)
        if hit is None and not normal:
            hit = self._forbidden.search(unicodedata.normalize("NFC", text))
        if hit is None:
            return
        word = hit.group()
        names = {"\0": "a NUL character"}
        lone = "\ud800" <= word[0] <= "\udfff"
        raise RowError(
            "QC-DATA-008",
            "contains text that must not reach the model",
            at=at,
            found=f"lone surrogate \\u{ord(word):04x}" if lone else names.get(word, repr(word)),
            expected="plain text; only the template writes control strings",
            fix=f"remove it from the row{_ADDED if word in self._own else ''}",
        )


def _has_characters(text: str) -> bool:
    """Whether a text has no lone surrogate."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _boolean(given: Mapping[str, Any], at: str) -> bool | None:
    mark = given.get("train")
    if mark is None or isinstance(mark, bool):
        return mark
    raise wrong(mark, f"{at}.train" if at else "train", "true or false")


def _variables(value: Any) -> dict[str, Any]:
    """The row's own template variables."""
    given = mapping(value, "chat_template_kwargs", "QC-DATA-049", "is not an object")
    for name in given:
        if name in STANDARD_INPUTS:
            raise RowError(
                "QC-DATA-049",
                "is set by qcore itself",
                at=f"chat_template_kwargs.{name}",
                fix="leave it out",
            )
    return without_nulls(given)
