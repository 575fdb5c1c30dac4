"""``qcore data convert`` and ``qcore data schema``: canonical rows, and what they may hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import debug_option, emit, json_option
from .data_options import RowOptions, source_options

if TYPE_CHECKING:
    from ..api.media import RowError
    from ..data.rejects import Rejects
    from ..data.source_counts import SourceCount
    from ..data.sources.source import Record, Source


@click.command("convert")
@source_options
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable.")
@json_option
@debug_option
def convert(output: Path, sets: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Convert FILES of any row format to canonical rows in OUTPUT/rows.jsonl."""
    from ..config.resolve import load_settings
    from ..data.convert import convert as convert_records
    from ..data.formats import load_formats
    from ..data.policies import Policies
    from ..data.rejects import Rejects

    wanted = RowOptions(preset=None, config_file=None, sets=sets, generation=None, **options)
    settings, _ = load_settings(sets=sets)
    counted = _Counted(Rejects(Policies.of(settings)))
    records = counted.records(wanted.sources(), settings.seed)
    report = convert_records(records, output, load_formats(), refuse=counted.refuse)
    if as_json:
        emit(report.as_json())
        return
    formats = ", ".join(f"{name} {count:,}" for name, count in sorted(report.formats.items()))
    click.echo(f"{output}: {report.rows:,} rows ({formats})")
    if report.rejected:
        click.echo(f"{report.rejected:,} rows were left out (bad_rows=skip)")
    for name, count in sorted(report.ignored.items()):
        click.echo(f"left out: {name} of {count:,} rows")
    for line in report.findings.lines():
        click.echo(line)
    if report.media_root is not None:
        click.echo(f"paths of media are absolute: pass --media-root {report.media_root}")


@click.command("schema")
@debug_option
def schema() -> None:
    """Print the JSON Schema of a canonical row."""
    from ..data.formats import schema as canonical

    click.echo(json.dumps(canonical(), indent=2, ensure_ascii=False))


@dataclass(slots=True)
class _Counted:
    """Numbers the records of sources, and stops the conversion as ``bad_rows`` says."""

    rejects: Rejects
    rows: int = 0
    counts: list[SourceCount] = field(default_factory=list)

    def records(self, sources: tuple[Source, ...], seed: int) -> Iterator[Record]:
        """The records; after the last one an error if too many were refused."""
        from ..data.source_counts import SourceCount
        from ..data.sources.containers import records

        for source in sources:
            count = SourceCount(source, first=self.rows + 1)
            self.counts.append(count)
            for record in records(source, seed=seed):
                self.rows += 1
                count.rows += 1
                yield record
        # Raised while the output is still being written, so that it is not published.
        self.rejects.stop(self.counts)

    def refuse(self, record: Record, error: RowError) -> None:
        """Count a refused row."""
        from ..data.rejects import RecordPlace

        place = RecordPlace(self.rows, record.line, record.path, record.source, record.unit)
        self.rejects.add(place, error)
