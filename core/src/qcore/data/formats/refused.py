"""Rows that qcore does not train: preference pairs, raw text, segments of text, token ids.

This file decides how such a row is recognized by its keys and what its owner can do. Preference
rows are refused whatever else they hold: their rejected answer must not be trained. Raw text is
refused only where no format reads the row.

Codes: ``QC-DATA-020`` a preference row, ``-021`` text without turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...api.media import RowError
from .reading import Reading
from .unread import meaningless

_REJECTED = (
    "rejected", "rejected_response", "rejected_messages", "negative_messages",
    "non_preferred_output",
)  # fmt: skip
_KTO = ("label", "kto_tag")
_SCOPE = "qcore trains supervised rows only"


def refuse_preference(row: Mapping[str, Any], reading: Reading) -> None:
    """Refuse a row with a chosen and a rejected answer, or an answer with a verdict.

    Raises:
        RowError: ``QC-DATA-020``.
    """
    for key in _REJECTED:
        if key in row and not meaningless(row[key]):
            raise _preference(key, _chosen_fix(row, key))
    if "chosen" in row and not meaningless(row["chosen"]) and "messages" not in row:
        raise _preference("chosen", _chosen_fix(row, ""))
    for key in _KTO:
        if isinstance(row.get(key), bool) and ({"completion", "messages"} & row.keys()):
            fix = f"take the rows whose {key} is true, with ignore_columns: [{key}] in a mix file"
            raise _preference(key, fix)
    if reading.fields.ranked:
        fix = "take a dataset without ranking and kto_tag, or map its chosen answer as the response"
        raise _preference("ranking", fix)


def refuse_text(row: Mapping[str, Any]) -> None:
    """Refuse a row that holds text without turns.

    Raises:
        RowError: ``QC-DATA-021``.
    """
    if not meaningless(row.get("segments")):
        raise RowError(
            "QC-DATA-021",
            "holds segments of text that bypass the chat template",
            at="segments",
            expected="messages, whose turns the template renders",
            fix='write each segment as a message, with "train": false where its label is false',
        )
    if isinstance(row.get("input_ids"), list):
        raise RowError(
            "QC-DATA-021",
            "holds token ids: without turns nothing says which of them are trained",
            at="input_ids",
            expected='{"messages": [...]}, or {"prompt": ..., "completion": ...}',
            fix="take the rows that the ids were made from: qcore renders and tokenizes them",
        )
    if isinstance(row.get("text"), str):
        raise RowError(
            "QC-DATA-021",
            "is raw text: without turns nothing says which tokens are trained",
            at="text",
            expected='{"messages": [...]}, or {"prompt": ..., "completion": ...}',
            fix="take the rows that the text was made from, or split it into prompt and completion",
        )


def _chosen_fix(row: Mapping[str, Any], rejected: str) -> str:
    """A mix file's entry that trains the chosen answer alone."""
    if rejected == "non_preferred_output":
        preferred = "the messages of input and of preferred_output as one list of messages"
        return f"to train the preferred answer alone, write {preferred}"
    passed = f"ignore_columns: [{rejected}]" if rejected else ""
    if meaningless(row.get("chosen")):
        fields = ""
    elif meaningless(row.get("prompt")):
        fields = "fields: {messages: chosen}"
    else:
        fields = "fields: {completion: chosen}"
    entry = ", ".join(part for part in (fields, passed) if part)
    return f"to train the preferred answer alone, write {entry} in a mix file"


def _preference(at: str, fix: str) -> RowError:
    return RowError(
        "QC-DATA-020",
        f"makes this a preference row (DPO, KTO, reward model), and {_SCOPE}",
        at=at,
        expected="one answer for each prompt",
        fix=fix,
    )
