"""What adapters record of the media that they were trained on, joined into one record.

This file decides that a record of several trainings lists the media of all of them. What a record
holds is up to `qcore.adapter.peft_names`. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def joined_media(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kinds and keys of media of two records of one tower.

    Args:
        before: the record of an adapter.
        after: that of the next one.

    Returns:
        ``kinds`` in the order in which they occur, and ``keys`` by kind, sorted.
    """
    kinds = dict.fromkeys(kind for record in (before, after) for kind in _list(record, "kinds"))
    keys: dict[str, list[str]] = {}
    for record in (before, after):
        by_kind = record.get("keys")
        if isinstance(by_kind, Mapping):
            for kind in by_kind:
                keys[kind] = sorted({*keys.get(kind, ()), *_list(by_kind, kind)})
    return {"kinds": [*kinds], "keys": keys}


def _list(record: Mapping[str, Any], key: str) -> list[str]:
    """Return the names in a list of a manifest; empty if it is malformed."""
    value = record.get(key)
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
