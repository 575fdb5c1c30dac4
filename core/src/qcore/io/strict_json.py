"""Strict JSON: refuses duplicate keys and, on request, NaN and infinity in JSON text.

This file decides which JSON documents are refused as ambiguous: objects with duplicate keys and,
on request, numbers that are not finite. The caller handles encoding, size limits, nesting limits
and the user's error.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, NoReturn


class DuplicateKeyError(ValueError):
    """An object has a duplicate key.

    Attributes:
        key: the duplicate key.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"key '{key[:100]}' stands twice")
        self.key = key


class NonFiniteError(ValueError):
    """A number is not finite.

    Attributes:
        text: the number as written.
        overflow: whether the text is a valid JSON number too large for a float; otherwise it
            is ``NaN`` or ``Infinity``, which JSON does not have.
    """

    def __init__(self, text: str, *, overflow: bool) -> None:
        super().__init__(f"number {text[:40]} is not finite")
        self.text = text
        self.overflow = overflow


def loads(text: str, *, finite: bool = False) -> Any:
    """Parse one JSON document.

    Args:
        text: the document.
        finite: refuse ``NaN``, ``Infinity`` and numbers that overflow a float.

    Raises:
        DuplicateKeyError: an object has a duplicate key.
        NonFiniteError: `finite` is set and a number is not finite.
        ValueError: the text is not JSON (`json.JSONDecodeError`), or an integer has more digits
            than Python converts.
        RecursionError: the nesting is too deep for the parser.
    """
    return (_FINITE if finite else _PLAIN).decode(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; a safetensors header can have 100,000, so the check must be cheap."""
    entries = dict(pairs)
    if len(entries) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise DuplicateKeyError(next(key for key, count in counts.items() if count > 1))
    return entries


def _constant(name: str) -> NoReturn:
    raise NonFiniteError(name, overflow=False)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise NonFiniteError(text, overflow=True)
    return value


_PLAIN = json.JSONDecoder(object_pairs_hook=_unique)
_FINITE = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_float)
