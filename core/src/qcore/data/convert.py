"""Writing canonical rows: records of any format become one JSON Lines file in a published folder.

This file decides what the folder of ``qcore data convert`` holds: ``rows.jsonl`` with a canonical
row a line, and a manifest with the schema's version, the formats and the columns that were left
out. Rows are repaired before they are written, because some repairs need the row as it was before
the conversion (null padding); those that depend on a chat template are left to training. The rows
of a source with ``train: false`` say so themselves. Relative paths of media become absolute,
because the file moves; the report names the folder that ``--media-root`` must allow. Whether a
template and a model accept the rows is left to ``qcore data check``; a row that no model could
train on is refused as in training (`qcore.data.rows`, `qcore.data.rejects`).

Codes: those of the row formats, of the repairs, of media paths, of `RowCheck` and of `Rejects`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..api.media import RowError
from ..api.records import ChatFormat
from ..io.artifact import publish
from .findings import Findings
from .formats import SCHEMA_VERSION, Formats
from .media.paths import Folders
from .rejects import RecordPlace, Rejects
from .repairs.notes import RepairContext
from .repairs.repair import repair
from .repairs.template_probes import Abilities
from .rows import RowCheck
from .source_counts import SourceCount
from .sources.source import Record

ROWS = "rows.jsonl"
_UNSAFE = re.compile("[\ud800-\udfff\u0085\u2028\u2029]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
#: A template that needs no repair: training repairs what its own template does not render.
_ANY_TEMPLATE = Abilities(calls="json", wraps_results=False, late_system=True, answers_first=True)
#: A format that writes nothing of its own: what a model's format forbids is left to training.
_ANY_FORMAT = ChatFormat(
    turn_start="",
    role_end="",
    turn_end="",
    assistant="assistant",
    prompt_tails=(),
    control=(),
    roles=("system", "user", "assistant", "tool"),
    stop_tokens=(),
)


@dataclass(slots=True, kw_only=True)
class ConvertReport:
    """What was converted.

    Attributes:
        output: the published folder.
        rows: rows that were written.
        rejected: rows that were refused.
        formats: rows by format.
        ignored: rows by column that was left out.
        findings: what was repaired or noticed.
        media_root: the folder below which all media of relative paths lie; ``None`` without any.
    """

    output: Path
    rows: int = 0
    rejected: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    findings: Findings = field(default_factory=Findings)
    media_root: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as ``--json`` prints it."""
        return {
            "output": str(self.output),
            "rows": self.rows,
            "rejected": self.rejected,
            "formats": dict(self.formats),
            "ignored_columns": dict(self.ignored),
            "findings": self.findings.summary(),
            "media_root": None if self.media_root is None else str(self.media_root),
        }


def convert(
    records: Iterable[Record],
    output: Path,
    formats: Formats,
    *,
    overwrite: bool = False,
    rejects: Rejects | None = None,
) -> ConvertReport:
    """Convert records and publish the folder `output`.

    Args:
        records: from `qcore.data.sources.containers`; each source's format, field mapping and
            ignored columns are used.
        output: the folder; absent or empty.
        formats: the row formats.
        overwrite: replace a folder that qcore has written.
        rejects: collects refused rows and decides whether they stop the conversion, so that
            nothing is written; by default they do.

    Raises:
        QcoreError: as `Rejects.stop`.
        WriteError: ``QC-WRITE-*``.
    """
    report = ConvertReport(output=output)
    rejects = rejects or Rejects()
    counts: list[SourceCount] = []
    made = _Lines(formats, report)
    with publish(output, "rows", overwrite) as writer:
        with writer.stream(ROWS) as stream:
            for number, record in enumerate(records, 1):
                if not counts or counts[-1].source is not record.source:
                    counts.append(SourceCount(record.source, first=number))
                counts[-1].rows += 1
                try:
                    line = made.line(record, number)
                except RowError as bad:
                    place = RecordPlace(
                        number, record.line, record.path, record.source, record.unit
                    )
                    rejects.add(place, bad)
                else:
                    report.rows += 1
                    stream.write(line)
        rejects.stop(counts)
        report.rejected = rejects.count
        bases = made.bases
        report.media_root = Path(os.path.commonpath(bases)) if bases else None
        writer.meta.update(
            {
                "schema_version": SCHEMA_VERSION,
                **{key: value for key, value in report.as_json().items() if key != "output"},
            }
        )
    return report


class _Lines:
    """Makes the canonical line of each record.

    Args:
        formats: the row formats.
        report: receives the counts.

    Attributes:
        bases: the folders below which media of relative paths lie.
    """

    def __init__(self, formats: Formats, report: ConvertReport) -> None:
        self._formats = formats
        self._report = report
        self._context = RepairContext(abilities=_ANY_TEMPLATE, kinds=formats.kinds)
        self._folders: dict[tuple[Path, Path | None], Folders] = {}
        self._check = RowCheck(_ANY_FORMAT, kinds=formats.kinds)
        self.bases: set[str] = set()

    def line(self, record: Record, number: int) -> bytes:
        """The row as one line of JSON.

        Args:
            record: the record.
            number: of the row, for findings.

        Raises:
            RowError: the row is refused.
        """
        if isinstance(record.value, RowError):
            raise record.value
        source = record.source
        read = self._formats.read(
            record.value, forced=source.format, fields=source.fields, ignore=source.ignore_columns
        )
        row, notes = repair(read.row, self._context, number=number, raw=record.value)
        self._check(record.line, row)
        if not source.train:
            row["train"] = False
        line = _json(self._with_absolute_media(row, record))
        self._report.formats[read.format] += 1
        self._report.ignored.update(set(read.ignored))
        self._report.findings.extend(notes)
        return line + b"\n"

    def _with_absolute_media(self, row: dict[str, Any], record: Record) -> dict[str, Any]:
        """The row with every relative path of a medium made absolute."""
        if all(isinstance(message["content"], str) for message in row["messages"]):
            return row

        def part(value: dict[str, Any], at: str) -> dict[str, Any]:
            named = value["type"]
            if named == "text":
                return value
            return {**value, named: self._absolute(value[named], record, at)}

        messages = [
            {
                **message,
                "content": [
                    part(item, f"messages[{index}].content[{place}]")
                    for place, item in enumerate(message["content"])
                ],
            }
            if isinstance(message["content"], list)
            else message
            for index, message in enumerate(row["messages"])
        ]
        return {**row, "messages": messages}

    def _absolute(self, value: Any, record: Record, at: str) -> Any:
        if isinstance(value, list):
            return [self._absolute(item, record, at) for item in value]
        if not isinstance(value, str) or _SCHEME.match(value) or os.path.isabs(value):
            return value
        key = record.path.parent, record.source.media_root
        folders = self._folders.setdefault(key, Folders(*key))
        try:
            path = folders.find(value)
        except RowError as bad:
            raise bad.within(at) from None
        base = next(
            folder
            for folder in (root.resolve() for root in key if root is not None)
            if path.is_relative_to(folder)
        )
        self.bases.add(str(base))
        return str(path)


def _json(row: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # bytes or NaN, which column formats have
        raise RowError(
            "QC-DATA-006", "holds a value that JSON does not have", found=error
        ) from None
    if not text.isascii():
        # Lone surrogates are not UTF-8, and some readers end a line at these three separators.
        text = _UNSAFE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)
    return text.encode("utf-8")
