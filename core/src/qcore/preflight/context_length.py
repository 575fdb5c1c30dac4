"""How many positions a model was made for, and what is said of more.

This file decides that a longer text is a warning: the blocks compute it, but nobody trained
them to. The number is config.json's ``max_position_embeddings``; where rotary embeddings are
scaled (``rope_parameters.factor``) it is at least the factor times the original length.

Codes: ``QC-PRE-013`` warning: more tokens than positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..api.records import Finding, Severity
from ..checkpoint.checkpoint import text_sections


def positions(config: Mapping[str, Any]) -> int | None:
    """Positions of the text model; ``None`` where config.json says no number."""
    for section in text_sections(config):
        if most := _number(section, "max_position_embeddings"):
            rope = section.get("rope_parameters")
            return int(max(most, _scaled(rope) if isinstance(rope, Mapping) else 0))
    return None


def _scaled(rope: Mapping[str, Any]) -> float:
    return _number(rope, "original_max_position_embeddings") * _number(rope, "factor")


def _number(section: Mapping[str, Any], key: str) -> float:
    """The number, or 0 where there is none; plugins' guards judge what is wrong with it."""
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        return 0.0
    return float(value)


def beyond(config: Mapping[str, Any], tokens: int, field: str, words: str = "") -> Finding | None:
    """The warning that `tokens` are, where they are more than positions.

    Args:
        config: config.json.
        tokens: of a row, or of a prompt and what is to follow.
        field: the setting or flag that says so.
        words: how they add up.
    """
    most = positions(config)
    if most is None or tokens <= most:
        return None
    return Finding(
        code="QC-PRE-013",
        severity=Severity.WARNING,
        what="is more than the positions that the model was made for",
        field=field,
        found=words or str(tokens),
        expected=f"at most {most} (max_position_embeddings)",
    )
