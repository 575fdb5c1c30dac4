"""What came from each source of rows, and what it lost, for the report and the manifest.

This file decides what a manifest states of a source: the values that the source sets itself, and
its counts. `qcore.data.reading` counts rows, `qcore.data.rejects` what is lost of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from .policies import POLICY_KEYS
from .sources.source import Source

#: Values of a source that the manifest states if the source sets them.
_SET: Final = (
    "revision", "config", "split", "format", "fields", "ignore_columns", "weight", "count", "seed",
    *POLICY_KEYS, "bad_rows_limit", "notes",
)  # fmt: skip


@dataclass(slots=True)
class SourceCount:
    """What came from one source; complete once its rows are read.

    Attributes:
        source: the source.
        first: number of its first row.
        sha256: hex digest of its files.
        rows: its rows, refused ones included.
        refused: rows that are refused, skipped ones included; `Rejects.stop` sets these four.
        skipped: those of them that ``bad_rows=skip`` leaves out.
        dropped: rows that ``long_rows`` leaves out.
        truncated: rows that ``long_rows`` cuts.
        formats: rows by row format.
    """

    source: Source
    first: int = 1
    sha256: str = ""
    rows: int = 0
    refused: int = 0
    skipped: int = 0
    dropped: int = 0
    truncated: int = 0
    formats: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """Everything but the source."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "source"}
        return {k: dict(v) if isinstance(v, Counter) else v for k, v in values.items()}

    @classmethod
    def of(cls, source: Source, value: Mapping[str, Any]) -> SourceCount:
        """The count of a source of its `as_json`."""
        values: dict[str, Any] = {
            k: Counter(v) if isinstance(v, dict) else v for k, v in value.items()
        }
        return cls(source, **values)

    def summary(self) -> dict[str, object]:
        """For a manifest."""
        return {
            **_source(self.source),
            "files": [path.name for path in self.source.files],
            "sha256": self.sha256,
            "rows": self.rows,
            "rejected_rows": self.refused,
            "dropped_rows": self.dropped,
            "truncated_rows": self.truncated,
            "formats": dict(sorted(self.formats.items())),
        }

    def line(self) -> str:
        """What the report states of the source."""
        losses = (
            (self.refused, "refused"),
            (self.dropped, "too long and left out"),
            (self.truncated, "cut"),
        )
        more = "".join(f", {count} {what}" for count, what in losses if count)
        return f"{self.source.name}: {self.rows} rows{more}"


def _source(source: Source) -> dict[str, Any]:
    """The name of a source and what it sets itself."""
    values = {key: getattr(source, key) for key in _SET}
    mix = None if source.mix is None else {"file": source.mix[0].name, "sha256": source.mix[1]}
    root = None if source.media_root is None else str(source.media_root)
    values |= {"media_root": root, "train": None if source.train else False, "mix": mix}
    stated = {k: v for k, v in values.items() if v is not None and v not in ("", (), {})}
    return {
        "name": source.name,
        **{key: list(v) if isinstance(v, tuple) else v for key, v in stated.items()},
    }
