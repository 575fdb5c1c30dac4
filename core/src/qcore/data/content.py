"""The content of a chat message: text parts, and media parts if the run has a reader for them.

This file decides which keys a part may have and its normal form. A template sees only the kind of
a media part, because the path or data URL may be megabytes long or contain control strings. The
path is kept separately as a `Reference`; `qcore.data.media.files` opens it.

A media part is ``{"type": KIND, KIND: a path, a data URL, or a list of them for a medium of several
frames}`` with ``sha256`` and the reader's options. Parts as other tools write them are read by
`qcore.data.formats.parts`, which makes such parts of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..api.media import RowError
from ..errors import nearest
from .formats.unread import installation
from .media.files import Given, Reference
from .tool_fields import kind, known_keys, mapping, without_nulls, wrong

if TYPE_CHECKING:
    from ..api.media import MediaReader

_SHA256 = re.compile("[0-9a-fA-F]{64}")
_TEXT = '{"type": "text", "text": ...}'
_WANTED = "a path, a data URL, or a list of them"


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
        self._key_advice = dict.fromkeys(("text", *self.kinds), "write it as a separate part")
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
            fix = f"write the text alone, or [{_TEXT}]" if isinstance(value, dict) else None
            raise wrong(value, at, "a string or a list of parts", fix=fix or "write it as a string")
        parts: list[dict[str, str]] = []
        media: list[Reference] = []
        for index, item in enumerate(value):
            here = f"{at}[{index}]"
            part = without_nulls(mapping(item, here, "QC-DATA-006", "is not a part"))
            named = part.get("type")
            if isinstance(named, str) and named in self.kinds:
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
        if self.kinds:
            return None
        return installation(self._unread) or "use a model and a plugin that read it"

    def _medium(self, part: Mapping[str, Any], at: str) -> Reference:
        name: str = part["type"]
        known = ("type", name, "sha256")
        keys = self._keys
        if keys is None:
            keys = tuple(key for key in part if key not in known)
        known_keys(part, (*known, *keys), at, "QC-DATA-006", self._key_advice)
        if name not in part:
            raise RowError(
                "QC-DATA-006", "has no path or data URL", at=at, expected=_example(name),
                fix=f"write the path under {name}, or list the files under {name}s beside messages",
            )  # fmt: skip
        given = _given(part[name], f"{at}.{name}")
        return Reference(
            kind=name,
            at=at,
            given=given,
            sha256=_digest(part.get("sha256"), given, at),
            options={key: part[key] for key in keys if key in part},
        )


def _given(value: Any, at: str) -> Given:
    """The path, data URL or frames that a part names.

    Raises:
        RowError: ``QC-DATA-006``.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(value, at, _WANTED)
    if not value:
        raise RowError("QC-DATA-006", "is an empty list", at=at, expected=_WANTED)
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise wrong(item, f"{at}[{index}]", "a path or a data URL")
    return tuple(value)


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
