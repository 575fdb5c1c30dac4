"""A source of rows: which files, read as which format, under which policies.

This file decides what is known of one entry of ``--data`` or of a mix file before a file is
opened. `qcore.data.sources.read` makes sources of paths, folders, hub ids and mix files;
`qcore.data.sources.containers` reads their records.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...api.media import RowError


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where rows come from, and how they are read.

    An empty string or ``None`` in a policy means: as the setting of the run says.

    Attributes:
        name: as the user wrote it: a path or a hub id; reports name it.
        files: files in the order in which they are read; those of a hub id lie in its cache.
        revision: commit of a hub dataset; empty for files.
        config: configuration of a hub dataset that the user named.
        split: split of a hub dataset that the user named.
        mix: the file that lists the source, if any, and its SHA-256.
        format: forced row format; empty: each row's is detected by its keys.
        fields: field mapping: canonical key -> key in the rows of this source.
        ignore_columns: keys of rows that are passed over.
        media_root: folder below which absolute media paths may lie.
        weight: share of this source in an epoch; ``None``: all rows once.
        count: rows to take; ``None``: all of them.
        seed: seed of the choice of `count` or `weight` rows; ``None``: the run's.
        turns: ``all`` or ``last``.
        reasoning: ``train``, ``mask`` or ``drop``.
        history: ``as_served`` or ``as_rendered``.
        long_rows: ``refuse``, ``drop``, ``truncate_turns`` or ``truncate_tokens``.
        bad_rows: ``refuse`` or ``skip``.
        bad_rows_limit: the largest fraction of its rows that may be skipped.
        train: whether rows of this source are trained; false: all of it is context.
        notes: what a report says of it: files that are not read, a name that does not fit the
            content.
    """

    name: str
    files: tuple[Path, ...]
    revision: str = ""
    config: str = ""
    split: str = ""
    mix: tuple[Path, str] | None = None
    format: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    ignore_columns: tuple[str, ...] = ()
    media_root: Path | None = None
    weight: float | None = None
    count: int | None = None
    seed: int | None = None
    turns: str = ""
    reasoning: str = ""
    history: str = ""
    long_rows: str = ""
    bad_rows: str = ""
    bad_rows_limit: float | None = None
    train: bool = True
    notes: tuple[str, ...] = ()

    def seeded(self, seed: int) -> Source:
        """This source with the run's seed, if it takes a share of its rows without one."""
        if self.seed is not None or (self.weight is None and self.count is None):
            return self
        return replace(self, seed=seed)


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file, before its row format is known.

    Attributes:
        source: where it comes from.
        path: the file.
        line: line of a text file, else the number of the record, from 1.
        value: the JSON value; a `RowError` if the record cannot be read.
        unit: what `line` counts: ``line``, ``element`` of a JSON array, ``row`` of a table.
    """

    source: Source
    path: Path
    line: int
    value: Any | RowError
    unit: str = "line"
