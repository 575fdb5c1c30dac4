"""Keys that a format does not read: which pass, which are reported, and which are refused.

This file decides by the meaning of a key and its value:

- an empty or null value means nothing and passes, at any depth (Arrow pads with nulls);
- a column of metadata (a string, a number, a list of tags) is left out and reported once;
- a key that could change what a model reads or learns is refused: an answer under a second name,
  a list of messages, functions or media that no format reads, a single file of media, a known key
  with a typing error;
- a key that changes the input (``context``, ``persona``) is left out where the messages have its
  text, and refused otherwise.

Which keys a format reads is decided by its converter.

Codes: ``QC-DATA-009`` media that no installed plugin reads, ``-022`` a mark that may mean either to
train a turn or not to, ``-024`` a key that could change the input.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ...api.media import RowError
from .reading import Reading

#: Keys of other tools that change the input; the format that reads one lists it as read.
_CONTEXT = (
    "context",
    "contexts",
    "passage",
    "document",
    "documents",
    "choices",
    "options",
    "hint",
    "background",
    "knowledge",
)
#: Keys of other tools that are system prompts.
_SYSTEM = (
    "system_message", "system_instruction", "system_instructions", "instructions", "persona",
    "sys", "sys_prompt", "system_content", "preamble",
)  # fmt: skip
#: Switches of messages that mean trained in some tools and not trained in others.
_UNCLEAR_MARKS = re.compile("(?i)train|loss|mask|ignore|skip|learn|supervis")
_SWITCH = (0, 1, "true", "false", "True", "False", "0", "1")  # true is 1, false is 0
_THOUGHTS = (
    "rationale", "cot", "chain_of_thought", "scratchpad", "thought", "thoughts", "think",
    "analysis",
)  # fmt: skip
_OBJECTS = ("objects",)
#: Media that rows of other tools name, also where no plugin reads them.
MEDIA = tuple("image video audio".split())  # noqa: SIM905, words of data files, not of the code
MEDIA_COLUMNS = frozenset(name for kind in MEDIA for name in (kind, f"{kind}s")) | {
    "picture", "pictures", "photo", "photos",
}  # fmt: skip
_HEARD = ("audio", "audios")
#: Lists and objects in messages that are metadata.
_META = ("annotations", "logprobs", "metadata", "usage", "header", "citations")
#: Keys that only tell a server how to cache.
_NOTHING = ("cache_control",)
_INSTALL = re.compile(r"pip install [\w.-]+")
_SENTENCE = re.compile(r"\n|\w+ \w+ ")  #: three words
_FILE = re.compile(
    r"(?i)^data:[a-z]+/|\.(png|jpe?g|gif|webp|bmp|tiff?|mp4|mov|avi|mkv|webm|wav|mp3|flac|ogg)$"
)


def installation(unread: str) -> str:
    """The command that installs a reader of media; empty if none is known.

    Args:
        unread: why no media are read, as `qcore.preflight.modality.unread` says it.
    """
    found = _INSTALL.search(unread)
    return found[0] if found else ""


def meaningless(value: Any) -> bool:
    """Whether a value is null or empty, or holds nothing but such values."""
    if isinstance(value, str):
        return not value
    if value is None:
        return True
    if isinstance(value, dict):
        return all(map(meaningless, value.values()))
    return isinstance(value, list) and all(map(meaningless, value))


def check_row(
    row: Mapping[str, Any],
    read: Collection[str],
    reading: Reading,
    messages: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Report or refuse the keys of a row that are not in `read`.

    Args:
        row: the foreign row.
        read: the keys that the format reads.
        reading: the row's state.
        messages: the canonical messages, which may repeat the text of a key.

    Raises:
        RowError: ``QC-DATA-009`` or ``-024``.
    """
    for key, value in row.items():
        if key in read or key in _NOTHING or meaningless(value):
            continue
        _check_input(key, value, read, messages)
        _check_meaning(key, read, reading)
        _check_values(key, value, key, reading)
        reading.ignored.append(key)


def check_message(
    message: Mapping[str, Any],
    read: Collection[str],
    at: str,
    reading: Reading,
    *,
    under: str = "messages[]",
) -> None:
    """Report or refuse the keys of a message, or of an object in it, that are not in `read`.

    Args:
        message: the message, a part of its content, a call.
        read: the keys that the format reads.
        at: its place in the row.
        reading: the row's state.
        under: its place in the names of left out keys; ``messages[].key`` passes over it, too.

    Raises:
        RowError: ``QC-DATA-009`` or ``-024``.
    """
    for key, value in message.items():
        if key in read or key in _NOTHING or meaningless(value):
            continue
        column = f"{under}.{key}"
        if reading.ignore.isdisjoint((column, f"messages[].{key}")):
            if _UNCLEAR_MARKS.search(key) and value in _SWITCH:
                raise RowError(
                    "QC-DATA-022",
                    "may mean that the turn is trained, or that it is not",
                    at=f"{at}.{key}",
                    expected="train: true or false",
                    fix=f"fields: {{train: {key}}} in a mix file, if 1 or true means trained; "
                    "else write train with the other value",
                )
            _check_typing(key, read, f"{at}.{key}", column)
            if key in _THOUGHTS and isinstance(value, str):
                raise _thoughts(key, f"{at}.{key}")
            if key not in _META:
                _check_values(key, value, f"{at}.{key}", reading)
            if isinstance(value, list | dict) and key not in _META:
                raise _refusal(
                    f"{at}.{key}",
                    "is not read, and its meaning is unknown",
                    fix=f"write it as part of the content, or, if it is metadata, "
                    f"ignore_columns: [{column}] in a mix file",
                )
        reading.ignored.append(column)


def _check_input(
    key: str, value: Any, read: Collection[str], messages: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a row's key that changes the input, unless the messages repeat it."""
    if key not in (*_CONTEXT, *_SYSTEM) or repeated(value, messages):
        return
    if key in _SYSTEM:
        fix = f"fields: {{system: {key}}} in a mix file makes it the system prompt"
    elif {"messages", "conversations", "conversation"} & set(read):
        fix = "write it into the turn that it belongs to; if it is metadata, "
        fix += f"ignore_columns: [{key}] in a mix file"
    else:
        fix = f"fields: {{input: {key}}} in a mix file appends it to the prompt"
    raise _refusal(key, "is not read, and it changes the prompt", fix=fix)


def repeated(value: Any, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every text in a value occurs in a message, blanks and line ends aside."""
    spoken = [_plain(text) for message in messages for text in _texts(message.get("content"))]
    return all(
        any(text in other for other in spoken) for text in map(_plain, _texts(value)) if text
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _check_meaning(key: str, read: Collection[str], reading: Reading) -> None:
    """Refuse a row's key whose name says that it changes the input."""
    answered = "messages" in read or "conversations" in read
    if key in _HEARD or key in _OBJECTS:
        raise _media(key, key, reading)
    if key in _THOUGHTS and not answered:
        raise _thoughts(key, key)
    _check_typing(key, read, key, key)


def _thoughts(key: str, at: str) -> RowError:
    fix = f"fields: {{reasoning_content: {key}}} in a mix file makes it the reasoning"
    return _refusal(at, "is not read, and it is part of the answer", fix=fix)


def _check_typing(key: str, read: Collection[str], at: str, column: str) -> None:
    if (meant := _misspelled(key, frozenset(read))) is not None:
        passed = f"ignore_columns: [{column}] in a mix file"
        raise _refusal(
            at, "unknown key", fix=f'did you mean "{meant}"? If it is metadata: {passed}'
        )


def _check_values(key: str, value: Any, at: str, reading: Reading) -> None:
    """Refuse lists and objects that hold messages, functions or media."""
    items = value if isinstance(value, list) else [value]
    first = next((item for item in items if item is not None), None)
    if isinstance(first, list):
        first = next((item for item in first if item is not None), None)
    if isinstance(first, dict):
        if {"role", "from"} & first.keys() and {"content", "value"} & first.keys():
            raise _refusal(
                at,
                "holds messages that are not read",
                fix=f"fields: {{messages: {key}}} in a mix file reads them; "
                f"ignore_columns: [{key}] passes over them",
            )
        if "function" in first or {"name", "parameters"} <= first.keys():
            raise _refusal(
                at,
                "holds functions that are not read",
                fix=f"fields: {{tools: {key}}} in a mix file",
            )
        if {"bytes", "path"} & first.keys():
            raise _media(at, key, reading)
    elif isinstance(first, bytes | bytearray) or (
        isinstance(first, str) and (key in MEDIA_COLUMNS or _is_file(first, value))
    ):
        raise _media(at, key, reading)


def _is_file(text: str, value: Any) -> bool:
    """Whether a text names a file of media; a sentence may end with such a name."""
    return bool(_FILE.search(text)) and (isinstance(value, list) or not _SENTENCE.search(text))


def _media(at: str, key: str, reading: Reading) -> RowError:
    if not reading.kinds or key in _HEARD or key in _OBJECTS:
        what = "holds media that no installed plugin reads"
        install = installation(reading.unread) if key not in (*_HEARD, *_OBJECTS) else ""
        fix = install or "use a model and a plugin that read them, or take rows without media"
    else:
        what = "holds media that are not read"
        fix = f"fields: {{{reading.kinds[0]}: {key}}} in a mix file reads them"
    column = f"messages[].{key}" if "[" in at else key
    passed = f"ignore_columns: [{column}] in a mix file"
    return RowError("QC-DATA-009", what, at=at, fix=f"{fix}; if it is metadata: {passed}")


def _refusal(at: str, what: str, *, fix: str) -> RowError:
    return RowError("QC-DATA-024", what, at=at, fix=fix)


@lru_cache(maxsize=4096)
def _misspelled(key: str, known: frozenset[str]) -> str | None:
    """The known key that differs from `key` by one edit or a swap of two letters."""
    lower = key.lower()
    near = [
        word
        for word in known
        if len(word) > 3
        and abs(len(word) - len(key)) < 2
        and word != key
        and _one_edit(lower, word)
    ]
    return min(near, default=None)


def _one_edit(left: str, right: str) -> bool:
    start = 0
    while start < min(len(left), len(right)) and left[start] == right[start]:
        start += 1
    one, two = left[start:], right[start:]
    if one[1:] == two[1:] or one[1:] == two or one == two[1:]:
        return True
    return one[:2] == two[1::-1] and one[2:] == two[2:]
