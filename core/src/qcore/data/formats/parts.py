"""Parts of a content, and media columns: where media of a row stand in its messages.

This file decides the canonical form of parts that other APIs write (``{kind}_url``, a
``source``, ``bytes`` of Arrow, ``path``, ``url``, ``base64``) and puts the media of a column where
the row has a mark ``<{kind}>`` or a part without media, else before the text of the first user
turn, as TRL does. The kinds are those of installed plugins; which bytes may be read is decided by
`qcore.data.media.files`.

Code: ``QC-DATA-025`` another number of media than of places.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ...api.media import RowError
from .reading import Reading
from .unread import check_message, meaningless

_TEXTS = ("text", "input_text", "output_text")
_SOURCES = ("path", "url", "base64", "data", "bytes", "source")
#: Keys of an object that is a medium: of OpenAI, of datasets, of Anthropic.
_OBJECT = ("url", "path", "bytes", "detail", "type", "data", "media_type", "file_id", "format")
_UNKNOWN = "application/octet-stream"
_MAGIC = {"iVBOR": "png", "/9j/": "jpeg", "R0lGO": "gif", "UklGR": "webp"}  # of base64


@lru_cache(maxsize=64)
def media_names(kinds: tuple[str, ...]) -> frozenset[str]:
    """Names of columns that hold media: each kind and its plural."""
    return frozenset(name for kind in kinds for name in (kind, f"{kind}s"))


def read_parts(parts: Sequence[Any], at: str, reading: Reading) -> list[dict[str, Any]]:
    """The parts in canonical form; a part of an unknown type stays for the row's check.

    Raises:
        RowError: ``QC-DATA-024`` for a key whose meaning is unknown.
    """
    return [_part(part, f"{at}[{index}]", reading) for index, part in enumerate(parts)]


def _part(part: Any, at: str, reading: Reading) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        return part  # type: ignore[no-any-return]  # refused by the row's check
    named = part.get("type")
    if named is None:
        held = [key for key in ("text", *reading.kinds) if not meaningless(part.get(key))]
        named = held[0] if len(held) == 1 else None
    media = (key for kind in reading.kinds for key in (kind, f"{kind}_url"))
    if named == "text" and any(not meaningless(part.get(key)) for key in media):
        return part  # refused by the row's check, which names the key
    if named in _TEXTS:
        check_message(part, ("type", "text"), at, reading, under="messages[].content[]")
        return {"type": "text", "text": part.get("text")}
    if named == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    for kind in reading.kinds:
        if named in (kind, f"{kind}_url", f"input_{kind}"):
            return _medium(part, kind, at, reading)
    return {key: value for key, value in part.items() if key != "cache_control"}


def _medium(part: Mapping[str, Any], kind: str, at: str, reading: Reading) -> dict[str, Any]:
    """A media part; its options stay."""
    names = (kind, f"{kind}_url", *_SOURCES)
    given = [(key, part[key]) for key in names if not meaningless(part.get(key))]
    options = {
        key: value
        for key, value in part.items()
        if key not in ("type", "cache_control", "detail", *names) and not meaningless(value)
    }
    detail = part.get("detail")
    key, value = given[0] if given else ("", None)
    if isinstance(value, dict):
        detail = value.get("detail", detail)
    if not meaningless(detail) and detail != "auto":
        reading.ignored.append("messages[].content[].detail")
    medium = {"type": kind}
    if len(given) == 1 or {name for name, _ in given} == {"bytes", "path"}:
        if key in ("base64", "data", "bytes"):
            value = data_url(value, kind)
        medium[kind] = reference(value, kind, f"{at}.{key}")
    elif given:
        raise RowError(
            "QC-DATA-024",
            "names its bytes twice",
            at=at,
            found=", ".join(name for name, _ in given),
            expected=f'{{"type": "{kind}", "{kind}": ...}}',
        )
    return {**medium, **options}


def reference(value: Any, kind: str, at: str) -> Any:
    """A path, URL or data URL of a medium; a list for frames; another value as it is.

    Raises:
        RowError: ``QC-DATA-024`` for a key of an object whose meaning is unknown.
    """
    if isinstance(value, list):
        return [reference(item, kind, f"{at}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, bytes | bytearray):
        return data_url(value, kind)
    if not isinstance(value, dict):
        return value
    for key in value:
        if key not in _OBJECT and not meaningless(value[key]):
            raise RowError(
                "QC-DATA-024",
                "unknown key of a medium",
                at=f"{at}.{key}",
                expected=", ".join(_OBJECT[:4]),
                fix=f"write options beside the medium: {{{kind!r}: ..., {key!r}: ...}}",
            )
    if not meaningless(value.get("bytes")):
        return data_url(value["bytes"], kind)
    if value.get("type") == "base64" and isinstance(value.get("data"), str):
        media = value.get("media_type") or _UNKNOWN
        return f"data:{media};base64,{value['data']}"
    return next((value[key] for key in ("path", "url") if not meaningless(value.get(key))), value)


def data_url(value: Any, kind: str) -> Any:
    """Bytes, or base64 text of them, as a data URL; another value as it is."""
    if isinstance(value, bytes | bytearray | memoryview):
        value = base64.b64encode(bytes(value)).decode("ascii")
    if not isinstance(value, str) or value[:5].lower() == "data:":
        return value
    found = next((name for magic, name in _MAGIC.items() if value.startswith(magic)), None)
    return f"data:{f'{kind}/{found}' if found else _UNKNOWN};base64,{value}"


def place_media(
    turns: Sequence[dict[str, Any]], row: Mapping[str, Any], at: str, reading: Reading
) -> list[dict[str, Any]]:
    """Put the media of a row's columns into its messages.

    Args:
        turns: canonical messages; not mutated.
        row: holds the columns, named like a kind or its plural.
        at: place of `row`, empty for the row itself.
        reading: the row's state.

    Raises:
        RowError: ``QC-DATA-025``, or ``-024`` for two columns of one kind.
    """
    placed = list(turns)
    for kind in reading.kinds:
        columns = [key for key in (f"{kind}s", kind) if not meaningless(row.get(key))]
        if not columns:
            continue
        where = f"{at}.{columns[0]}" if at else columns[0]
        if len(columns) > 1:
            raise RowError(
                "QC-DATA-024", "stands beside a second column of the same media",
                at=where, found=" and ".join(columns), expected="one of them",
            )  # fmt: skip
        value = row[columns[0]]
        values = value if isinstance(value, list) else [value]
        placed = _fill(
            placed,
            [reference(item, kind, f"{where}[{n}]") for n, item in enumerate(values)],
            kind,
            where,
        )
    return placed


def _fill(
    turns: list[dict[str, Any]], values: list[Any], kind: str, at: str
) -> list[dict[str, Any]]:
    bare = sum(_bare(part, kind) for turn in turns for part in _parts(turn))
    mark = f"<{kind}>"
    texts = [part["text"] for turn in turns for part in _parts(turn) if _is_text(part)]
    marks = 0 if bare else sum(text.count(mark) for text in texts)
    if not bare and not marks:
        return _lead(turns, values, kind, at)
    if (bare or marks) != len(values):
        raise RowError(
            "QC-DATA-025",
            f"has another number of media than the messages have {'parts' if bare else 'marks'}",
            at=at,
            found=f"{len(values)} media, {bare or marks} of {mark}",
            expected="one for each, in their order",
            fix=f'write the parts themselves: {{"type": "{kind}", "{kind}": <path or data URL>}}',
        )
    rest = iter(values)
    return [
        {**turn, "content": _filled(_parts(turn), kind, rest, bare=bool(bare))}
        if any(_bare(part, kind) if bare else mark in _text(part) for part in _parts(turn))
        else turn
        for turn in turns
    ]


def _filled(
    parts: Sequence[Any], kind: str, values: Iterator[Any], *, bare: bool
) -> list[dict[str, Any]]:
    filled: list[dict[str, Any]] = []
    for part in parts:
        if bare and _bare(part, kind):
            filled.append({**part, kind: next(values)})
        elif bare or f"<{kind}>" not in _text(part):
            filled.append(part)
        else:
            for index, text in enumerate(_text(part).split(f"<{kind}>")):
                if index:
                    filled.append({"type": kind, kind: next(values)})
                if text:
                    filled.append({"type": "text", "text": text})
    return filled


def _lead(
    turns: list[dict[str, Any]], values: list[Any], kind: str, at: str
) -> list[dict[str, Any]]:
    """Put media without a mark before the text of the first user turn."""
    media = [{"type": kind, kind: value} for value in values]
    for index, turn in enumerate(turns):
        if turn["role"] == "user":
            led = {**turn, "content": [*media, *(part for part in _parts(turn) if part)]}
            return [*turns[:index], led, *turns[index + 1 :]]
    raise RowError("QC-DATA-025", "has media, but the row has no user turn", at=at)


def _parts(turn: Mapping[str, Any]) -> list[Any]:
    content = turn.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content if isinstance(content, list) else []


def _bare(part: Any, kind: str) -> bool:
    return isinstance(part, dict) and part.get("type") == kind and meaningless(part.get(kind))


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)


def _text(part: Any) -> str:
    return part["text"] if _is_text(part) else ""
