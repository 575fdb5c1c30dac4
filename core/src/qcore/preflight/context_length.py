"""The context length of a model, and the warning for longer texts.

This file decides that a longer text is a warning, because the model computes it but was not trained
on such positions. The context length is config.json's ``max_position_embeddings``; with scaled
rotary embeddings (``rope_parameters.factor``) it is at least the factor times the original length.

Codes: ``QC-PRE-013`` warning: more tokens than positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..api.records import Finding, Severity
from ..checkpoint.checkpoint import text_sections


def positions(config: Mapping[str, Any]) -> int | None:
    """Context length of the text model; ``None`` if config.json has none."""
    for section in text_sections(config):
        if most := _number(section, "max_position_embeddings"):
            rope = section.get("rope_parameters")
            return int(max(most, _scaled(rope) if isinstance(rope, Mapping) else 0))
    return None


def _scaled(rope: Mapping[str, Any]) -> float:
    return _number(rope, "original_max_position_embeddings") * _number(rope, "factor")


def _number(section: Mapping[str, Any], key: str) -> float:
    """A positive number, else 0; guards of plugins report invalid values."""
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        return 0.0
    return float(value)


def beyond(config: Mapping[str, Any], tokens: int, field: str, words: str = "") -> Finding | None:
    """The warning for more tokens than positions, if any.

    Args:
        config: config.json.
        tokens: of a row, or of a prompt and its completion.
        field: the setting or flag that asks for them.
        words: how `tokens` is made up, for the message.
    """
    most = positions(config)
    if most is None or tokens <= most:
        return None
    return Finding(
        code="QC-PRE-013",
        severity=Severity.WARNING,
        what="exceeds the context length of the model",
        field=field,
        found=words or str(tokens),
        expected=f"at most {most} (max_position_embeddings)",
    )
