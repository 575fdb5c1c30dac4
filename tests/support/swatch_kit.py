"""A modality of the tests' own: swatches, whose bytes are numbers in text.

``3 5 7`` is a swatch of three tokens. Its reader decodes, expands and places them, and shares no
line with what it tests; what a tower reads of a pack is no part of it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from support.chat_kit import TEMPLATE, FakeCheckpoint, own_template, own_tokenizer

from qcore.api.media import Payload, Placed, RowError

OPEN, DOT, CLOSE = "<|open|>", "<|dot|>", "<|close|>"
PLACE = OPEN + DOT + CLOSE

_SHOW = """\
{%- macro show(content) %}
    {%- if content is string %}{{- content }}
    {%- else %}
        {%- for item in content %}
            {%- if item.type == 'swatch' %}{{- '<|open|><|dot|><|close|>' }}
            {%- else %}{{- item.text }}{% endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
"""
#: The tests' template, with parts.
SWATCH_TEMPLATE = _SHOW + TEMPLATE.replace("m.content | default('')", "said").replace(
    "m.content", "show(m.content)"
).replace("said", "show(m.content or '')")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Swatch:
    kind: str
    digest: str
    numbers: tuple[int, ...]
    options: dict[str, Any]

    @property
    def tokens(self) -> int:
        return len(self.numbers)

    @property
    def units(self) -> int:
        return 4 * len(self.numbers)


class SwatchReader:
    """Reads the first line's worth of a payload; refuses what are no numbers."""

    kinds: tuple[str, ...] = ("swatch",)
    keys: tuple[str, ...] = ("shade", "max_dots")
    control: tuple[str, ...] = (OPEN, DOT, CLOSE)

    def __init__(self) -> None:
        self.payloads: list[Payload] = []
        self.keeps = True  # the payloads that it was given

    def read(self, payload: Payload) -> Swatch:
        if self.keeps:
            self.payloads.append(payload)
        with payload.open() as file:
            given = file.read(4096)
        try:
            numbers = tuple(int(word) for word in given.split())
        except ValueError:
            raise RowError("QC-SWATCH-001", "is no swatch", found=repr(given[:20])) from None
        if payload.options.get("shade", "red") not in ("red", "blue"):
            raise RowError("QC-SWATCH-002", "is no shade", at="shade")
        return Swatch(
            kind=payload.kind,
            digest=hashlib.md5(payload.sha256.encode()).hexdigest(),
            numbers=numbers,
            options=dict(payload.options),
        )

    def expand(self, text: str, media: Sequence[Swatch]) -> str:
        first, *rest = text.split(PLACE)
        if len(rest) != len(media):
            raise RowError(
                "QC-SWATCH-003",
                "has another number of placeholders than of swatches",
                found=len(rest),
                expected=len(media),
            )
        grown = (
            OPEN + DOT * swatch.tokens + CLOSE + after
            for swatch, after in zip(media, rest, strict=True)
        )
        return first + "".join(grown)

    def place(self, ids: Sequence[int], media: Sequence[Swatch]) -> Placed:
        dot = swatch_tokenizer().token_to_id(DOT)
        where = array("i", (at for at, id_ in enumerate(ids) if id_ == dot))
        steps = count()
        still = array("i", (-1 if id_ == dot else next(steps) for id_ in ids))
        return Placed(where=where, positions=(array("i", range(len(ids))), still))

    def batch(self, media: Sequence[Swatch], where: Any) -> Any:
        raise AssertionError("the data path makes no batch")


_TOKENIZER: list[Any] = []


def swatch_tokenizer() -> Any:
    """With tokens of swatches that are not marked special: their reader alone names them."""
    if not _TOKENIZER:
        tokenizer = own_tokenizer()
        tokenizer.add_tokens([OPEN, DOT, CLOSE])
        _TOKENIZER.append(tokenizer)
    return _TOKENIZER[0]


def swatch_checkpoint(folder: Path, template: str = SWATCH_TEMPLATE) -> FakeCheckpoint:
    folder.mkdir(parents=True, exist_ok=True)
    swatch_tokenizer().save(str(folder / "tokenizer.json"))
    return FakeCheckpoint(folder, own_template(template))


def swatch(given: Any, **more: Any) -> dict[str, Any]:
    return {"type": "swatch", "swatch": given, **more}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}
