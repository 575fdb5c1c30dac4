"""What a run knows of its rows beside the samples: counts, findings, refused rows, chat variables.

This file decides what is kept of a rendering, so that the next run reports the same lines without
reading a row. `qcore.data.store.cache` decides where it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..findings import Findings
from ..rejects import Rejects
from ..source_counts import SourceCount


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """The result of a rendering, beside the samples.

    Attributes:
        train: number of the samples of training sources, which come first.
        counts: what came from each training source.
        eval_counts: what came from each source that is only evaluated.
        findings: what there is to say of the rows.
        rejects: rows that were refused.
        dropped: rows that ``long_rows`` left out.
        truncated: rows that ``long_rows`` cut.
        asked: by number of a row: reader options that its parts set themselves.
        template_sha256: digest of the chat template.
        switch: variable that turns thinking on and off; empty: the template has none.
    """

    train: int
    counts: tuple[SourceCount, ...]
    eval_counts: tuple[SourceCount, ...]
    findings: Findings
    rejects: Rejects
    dropped: int
    truncated: int
    asked: Mapping[int, frozenset[tuple[str, str]]]
    template_sha256: str
    switch: str

    @property
    def rows(self) -> int:
        """Rows of all sources, refused ones included."""
        return sum(count.rows for count in (*self.counts, *self.eval_counts))

    def as_json(self) -> dict[str, Any]:
        """Everything but the findings and the refused rows, which have files of their own."""
        options: dict[tuple[tuple[str, str], ...], list[int]] = {}
        for row, keys in self.asked.items():
            options.setdefault(tuple(sorted(keys)), []).append(row)
        return {
            "train": self.train,
            "counts": [count.as_json() for count in self.counts],
            "eval_counts": [count.as_json() for count in self.eval_counts],
            "rejects": self.rejects.state(),
            "dropped": self.dropped,
            "truncated": self.truncated,
            "asked": [[list(map(list, keys)), rows] for keys, rows in options.items()],
            "template_sha256": self.template_sha256,
            "switch": self.switch,
        }


def asked_of(value: list[Any]) -> dict[int, frozenset[tuple[str, str]]]:
    """`Rendered.asked` of its JSON."""
    found: dict[int, frozenset[tuple[str, str]]] = {}
    for keys, rows in value:
        found |= dict.fromkeys(rows, frozenset((kind, key) for kind, key in keys))
    return found
