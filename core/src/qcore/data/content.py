"""The content of a chat message: text parts, and media parts if the run has a reader for them.

This file decides which keys a part may have and its normal form. A template sees only the kind of
a media part, because the path or data URL may be megabytes long or contain control strings. The
path is kept separately as a `Reference`; `qcore.data.media.files` opens it.

Besides ``{"type": "image", "image": ...}``, a part may name its file as other tools do:
``{"type": "image_url", "image_url": {"url": ...}}`` (OpenAI; ``detail`` has no meaning for a local
model and is dropped), ``path``, ``url`` or ``base64`` (transformers), ``{"bytes": ..., "path":
...}`` (the ``Image`` feature of datasets), and a list of files for a medium of several frames.
``cache_control`` of a part configures Anthropic's server and is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..api.media import RowError
from ..errors import nearest
from .media.files import Given, Reference
from .tool_fields import kind, known_keys, mapping, without_nulls, wrong

if TYPE_CHECKING:
    from ..api.media import MediaReader

_SHA256 = re.compile("[0-9a-fA-F]{64}")
_TEXT = '{"type": "text", "text": ...}'
_SERVING = "cache_control"
_DETAIL = "detail"
#: Keys of transformers for the file of a part, beside the key named like its type.
_SOURCES = ("path", "url", "base64")
_WANTED = "a path, a data URL, bytes, or a list of them"


class ContentReader:
    """Checks and normalizes the content of messages.

    Args:
        reader: reads the kinds of media that are allowed; without it content is text only.
        unread: why there is no reader, for the error.
        kinds: without a reader: kinds that parts may have; their options are not checked.

    Attributes:
        kinds: allowed kinds of media.
        row_advice: fixes by misplaced key of a row.
    """

    def __init__(
        self, reader: MediaReader | None = None, unread: str = "", kinds: Sequence[str] = ()
    ) -> None:
        self.kinds = tuple(kinds) if reader is None else reader.kinds
        self._keys = None if reader is None else reader.keys
        self._unread = unread
        self._types = {name: name for name in self.kinds}
        self._types |= {f"{name}_url": name for name in self.kinds}
        apart = dict.fromkeys(("text", *self._types), "write it as a separate part")
        self._key_advice = apart | {"data": "write the bytes under base64"}
        among = {
            name: f"put it into the content of a message: {_example(name)}" for name in self.kinds
        }
        #: Fixes for media keys beside ``messages``; other formats put a list of files there.
        self.row_advice = among | {f"{name}s": how for name, how in among.items()}

    def content(
        self, value: Any, at: str
    ) -> tuple[str | list[dict[str, str]], tuple[Reference, ...]]:
        """Normalize a content to text or a list of parts, and collect its media references.

        Raises:
            RowError: ``QC-DATA-006``, or ``-009`` for a part of an unknown type.
        """
        if isinstance(value, str):
            return value, ()
        if not isinstance(value, list):
            raise wrong(value, at, "a string or a list of parts")
        parts: list[dict[str, str]] = []
        media: list[Reference] = []
        for index, item in enumerate(value):
            here = f"{at}[{index}]"
            part = without_nulls(mapping(item, here, "QC-DATA-006", "is not a part"))
            part.pop(_SERVING, None)
            named = part.get("type")
            if isinstance(named, str) and named in self._types:
                medium = self._medium(part, here)
                media.append(medium)
                parts.append({"type": medium.kind, medium.kind: medium.kind})
            else:
                parts.append({"type": "text", "text": self._text(part, here)})
        return parts, tuple(media)

    def _text(self, part: Mapping[str, Any], at: str) -> str:
        named = part.get("type")
        if isinstance(named, str) and named != "text":
            raise RowError(
                "QC-DATA-009",
                "is a part of an unknown type",
                at=at,
                found=repr(named)[:80],
                expected=self._read(),
                fix=self._advice(named),
            )
        if named != "text" or not isinstance(part.get("text"), str):
            raise RowError(
                "QC-DATA-006",
                "is not a valid text part",
                at=at,
                found=", ".join(f"{key}: {kind(inner)}" for key, inner in part.items())[:120],
                expected=_TEXT,
                fix=next((f"write {_example(key)}" for key in self.kinds if key in part), None),
            )
        for key, inner in part.items():
            # Clients fill in empty values, such as OpenAI's ``"annotations": []``.
            if key not in ("type", "text") and inner not in ("", [], {}):
                raise RowError(
                    "QC-DATA-006",
                    "unknown key of a text part",
                    at=f"{at}.{key}",
                    found=kind(inner),
                    expected=_TEXT,
                    fix=self._key_advice.get(key, "move it to metadata of the row"),
                )
        text: str = part["text"]
        return text

    def _read(self) -> str:
        if self.kinds:
            return " or ".join(("text", *self.kinds))
        return f"text parts: {self._unread}" if self._unread else "text parts"

    def _advice(self, named: str) -> str | None:
        """The fix for an unknown type of part."""
        for known in self.kinds:
            if known in named:
                return f"write {_example(known)}"
        meant = nearest(named.lower(), ("text", *self.kinds))
        if meant:
            return f'did you mean "{meant}"?'
        return None if self.kinds else "use a model and a plugin that read it"

    def _medium(self, part: Mapping[str, Any], at: str) -> Reference:
        named: str = part["type"]
        name = self._types[named]
        if named != name:
            part = {key: inner for key, inner in part.items() if key != _DETAIL}
        sources = (named, name, *_SOURCES)
        known = ("type", *dict.fromkeys(sources), "sha256")
        keys = self._keys
        if keys is None:
            keys = tuple(key for key in part if key not in known)
        known_keys(part, (*known, *keys), at, "QC-DATA-006", self._key_advice)
        stated = [key for key in dict.fromkeys(sources) if key in part]
        if len(stated) != 1:
            raise RowError(
                "QC-DATA-006",
                "has several sources" if stated else "has no path or data URL",
                at=at,
                found=" and ".join(stated) or None,
                expected=_example(name),
                fix="write one of them" if stated else None,
            )
        given = _given(part[stated[0]], f"{at}.{stated[0]}", encoded=stated[0] == "base64")
        return Reference(
            kind=name,
            at=at,
            given=given,
            sha256=_digest(part.get("sha256"), given, at),
            options={key: part[key] for key in keys if key in part},
        )


def _given(value: Any, at: str, *, encoded: bool = False, nested: bool = True) -> Given:
    """The path, data URL, bytes or frames that a part names.

    Args:
        value: of the part's key.
        at: its place in the row.
        encoded: whether a string is base64 without the head of a data URL.
        nested: whether `value` may be a list.

    Raises:
        RowError: ``QC-DATA-006``.
    """
    if isinstance(value, str):
        return f"data:;base64,{value}" if encoded and value[:5].lower() != "data:" else value
    if isinstance(value, bytes):
        return value
    if isinstance(value, list) and nested:
        if not value:
            raise RowError("QC-DATA-006", "is an empty list", at=at, expected=_WANTED)
        files = [_given(item, f"{at}[{i}]", nested=False) for i, item in enumerate(value)]
        return tuple(one for one in files if not isinstance(one, tuple))
    if not isinstance(value, dict):
        raise wrong(value, at, _WANTED)
    source = without_nulls(value)
    # OpenAI's {"url": ..., "detail": ...}; of datasets, {"bytes": ..., "path": the file's name}.
    known = ("url", _DETAIL) if "url" in source else ("bytes", "path")
    known_keys(source, known, at, "QC-DATA-006", {})
    for key in ("url", "bytes", "path"):
        if key in source:
            inner = source[key]
            if not isinstance(inner, str | bytes if key == "bytes" else str):
                raise wrong(inner, f"{at}.{key}", "bytes, or a base64 string" if key == "bytes"
                            else "a string")  # fmt: skip
            return _given(inner, at, encoded=key == "bytes", nested=False)
    raise RowError("QC-DATA-006", "names no file and has no bytes", at=at, expected=_WANTED)


def _digest(stated: Any, given: Given, at: str) -> str | None:
    """The stated SHA-256 of a part in lower case, if any."""
    if stated is None:
        return None
    if isinstance(given, tuple):
        raise RowError(
            "QC-DATA-006",
            "is the digest of one file, but the part lists several",
            at=f"{at}.sha256",
            fix="move it to metadata of the row",
        )
    if not (isinstance(stated, str) and _SHA256.fullmatch(stated)):
        raise RowError(
            "QC-DATA-006",
            "is not a SHA-256 digest",
            at=f"{at}.sha256",
            found=kind(stated),
            expected="64 hexadecimal digits",
        )
    return stated.lower()


def _example(named: str) -> str:
    return f'{{"type": "{named}", "{named}": <path relative to the data file, or data URL>}}'


def text_of(said: Any) -> str:
    """The text of a checked content, with its parts concatenated as templates do."""
    if isinstance(said, str):
        return said
    return "".join(part["text"] for part in said if part["type"] == "text")
