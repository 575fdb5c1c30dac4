"""The content of a chat message: text parts, and media parts if the run has a reader for them.

This file decides which keys a part may have and its normal form. A template sees only the kind of
a media part, because the path or data URL may be megabytes long or contain control strings. The
path is kept separately as a `Reference`; `qcore.data.media_files` opens it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..api.media import RowError
from ..errors import nearest
from .media_files import Reference
from .tool_fields import ADVICE, kind, known_keys, mapping, without_nulls, wrong

if TYPE_CHECKING:
    from ..api.media import MediaReader

_SHA256 = re.compile("[0-9a-fA-F]{64}")
_NAMES = ("path", "url", "base64", "data")  # keys for the bytes in other formats
_TEXT = '{"type": "text", "text": ...}'


class ContentReader:
    """Checks and normalizes the content of messages.

    Args:
        reader: reads the kinds of media that are allowed; without it content is text only.
        unread: why there is no reader, for the error.

    Attributes:
        kinds: allowed kinds of media.
        row_advice: fixes by misplaced key of a row.
    """

    def __init__(self, reader: MediaReader | None = None, unread: str = "") -> None:
        self.kinds = () if reader is None else reader.kinds
        self._keys = () if reader is None else reader.keys
        self._unread = unread
        apart = dict.fromkeys(("text", *self.kinds), "write it as a separate part")
        self._key_advice = _ADVICE | apart
        among = {
            name: f"put it into the content of a message: {_example(name)}" for name in self.kinds
        }
        #: Fixes for media keys beside ``messages``; other formats put a list of files there.
        self.row_advice = ADVICE | among | {f"{name}s": how for name, how in among.items()}

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
            named = part.get("type")
            if named in self.kinds:
                media.append(self._medium(part, here))
                parts.append({"type": named, named: named})
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
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise RowError(
                "QC-DATA-006",
                "is not a valid text part",
                at=at,
                found=", ".join(f"{key}: {kind(inner)}" for key, inner in part.items())[:120],
                expected=_TEXT,
                fix=next((f"write {_example(key)}" for key in self.kinds if key in part), None),
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
        return None if self.kinds else "remove the part, or use a model and a plugin that read it"

    def _medium(self, part: Mapping[str, Any], at: str) -> Reference:
        named: str = part["type"]
        known = ("type", named, "sha256", *self._keys)
        known_keys(part, known, at, "QC-DATA-006", self._key_advice)
        given, digest = part.get(named), part.get("sha256")
        if given is None:
            raise RowError(
                "QC-DATA-006",
                "has no path or data URL",
                at=at,
                expected=_example(named),
            )
        if not isinstance(given, str):
            raise wrong(given, f"{at}.{named}", "a relative path or a data URL, as a string")
        if digest is not None and not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise RowError(
                "QC-DATA-006",
                "is not a SHA-256 digest",
                at=f"{at}.sha256",
                found=kind(digest),
                expected="64 hexadecimal digits",
            )
        return Reference(
            kind=named,
            at=at,
            given=given,
            sha256=digest and digest.lower(),
            options={key: part[key] for key in self._keys if key in part},
        )


def _example(named: str) -> str:
    return f'{{"type": "{named}", "{named}": <path relative to the data file, or data URL>}}'


_ADVICE = dict.fromkeys(_NAMES, "write the path or data URL under the key named like the type")


def text_of(said: Any) -> str:
    """The text of a checked content, with its parts concatenated as templates do."""
    if isinstance(said, str):
        return said
    return "".join(part["text"] for part in said if part["type"] == "text")
