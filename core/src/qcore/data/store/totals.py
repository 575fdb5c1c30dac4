"""What manifests record of all samples of a store: how turns were rendered, and their media.

This file decides how these are counted from the index, without reading a sample; media are counted
from what the store knows of them, without reading their bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..rendering.chat_record import ChatRecord, TrainedTurns, chat_record
from .rendered import Rendered
from .samples import Samples


def trained_chat(train: Samples, rendered: Rendered, variables: Mapping[str, Any]) -> ChatRecord:
    """How the turns of the training samples were rendered.

    Args:
        train: the training samples.
        rendered: of the same store.
        variables: inputs of the template that the user set.
    """
    starts, codes = train.starts(), train.column("variables")
    trained = TrainedTurns(
        turns=int(train.column("turns").sum(dtype=np.int64)),
        reasoned=int(train.column("reasoned").sum(dtype=np.int64)),
    )
    values, first, counts = np.unique(codes[starts], return_index=True, return_counts=True)
    for at in np.argsort(first).tolist():  # in the order in which the rows have them
        trained.add_rows(train.store.variables[values[at]], int(counts[at]))
    return chat_record(rendered.template_sha256, variables, rendered.switch, trained)


def media_totals(
    every: Samples, trained: frozenset[int], asked: Mapping[int, frozenset[tuple[str, str]]]
) -> dict[str, Any]:
    """Counts of media for the summary; empty for a text-only file.

    Args:
        every: all samples.
        trained: numbers of the training rows.
        asked: as `Rendered.asked`.
    """
    media, train_media = Counter[str](), Counter[str]()
    rows = tokens = 0
    digest = hashlib.sha256()
    for row, some in every.with_media():
        rows += 1
        for medium in some:
            media[medium.kind] += 1
            train_media[medium.kind] += row in trained
            tokens += medium.tokens
            digest.update(f"{medium.kind}:{medium.digest}\n".encode())
    if not rows:
        return {}
    keys: dict[str, set[str]] = {}
    for kind, key in {pair for row, pairs in asked.items() if row in trained for pair in pairs}:
        keys.setdefault(kind, set()).add(key)
    return {
        "media": dict(sorted(media.items())),
        "train_media": dict(sorted((+train_media).items())),
        "media_rows": rows,
        "media_tokens": tokens,
        "media_sha256": digest.hexdigest(),
        "media_keys": {kind: sorted(some) for kind, some in sorted(keys.items())},
    }
