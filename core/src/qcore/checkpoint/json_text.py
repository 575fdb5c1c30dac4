"""Removes members from the text of a JSON object, and leaves all other text as it is.

This file decides where a member begins and ends, so that a copied file differs from the original in
nothing else.
"""

from __future__ import annotations

import json
import re

_SPACE = re.compile(r"[ \t\n\r]*")


def without(text: str, key: str) -> str:
    """The text of a JSON object less every member `key`, at any depth; all else as it stands.

    Args:
        text: JSON that was parsed before.
        key: the members' name.
    """
    cuts: list[tuple[int, int]] = []
    _members(text, _skip(text, 0), key, cuts)
    for start, end in sorted(cuts, reverse=True):
        text = text[:start] + text[end:]
    return text


def _members(text: str, at: int, key: str, cuts: list[tuple[int, int]]) -> int:
    """Note what to cut of the object that opens at `at`; returns where it ends."""
    decode = json.JSONDecoder().raw_decode
    spans: list[tuple[str, int, int]] = []  # name, start, end
    at = _skip(text, at + 1)
    while text[at] != "}":
        start = at
        name, at = decode(text, at)
        at = _skip(text, _skip(text, at) + 1)
        if text[at] == "{" and name != key:
            at = _members(text, at, key, cuts)
        else:
            _, at = decode(text, at)
        spans.append((name, start, at))
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    for number, (name, start, end) in enumerate(spans):
        if name == key and number + 1 < len(spans):
            cuts.append((start, spans[number + 1][1]))
        elif name == key:
            cuts.append((spans[number - 1][2] if number else start, end))
    return at + 1


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space is not None
    return space.end()
