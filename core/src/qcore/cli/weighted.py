"""Adapters with weights on the command line: ``NAME`` or ``NAME=WEIGHT``.

This file decides that a name with ``=`` in it is a path where one exists, and that each adapter is
named once.

Code: ``QC-ADAPTER-019`` a weight that is not a number, or an adapter that is named twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..errors import UsageError


def weighted_adapters(words: Iterable[str]) -> dict[str, float]:
    """Return the weight of each adapter; 1 where a word has none.

    Raises:
        UsageError: ``QC-ADAPTER-019``.
    """
    weights: dict[str, float] = {}
    for word in words:
        name, equals, number = word.rpartition("=")
        weight = 1.0
        if not equals or Path(word).exists():
            name = word
        else:
            weight = _number(word, number)
        if name in weights:
            raise UsageError(
                "QC-ADAPTER-019", "is named twice", field=name, expected="each adapter once",
                fix="name it once, with the sum of the weights",
            )  # fmt: skip
        weights[name] = weight
    return weights


def _number(word: str, number: str) -> float:
    try:
        return float(number)
    except ValueError:
        raise UsageError(
            "QC-ADAPTER-019", "has an invalid weight", field=word,
            found=number, expected="a finite number", fix="pass NAME or NAME=0.5",
        ) from None  # fmt: skip
