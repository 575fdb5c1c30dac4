"""``qcore data convert`` and ``qcore data schema``: canonical rows, and what they may hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .common import debug_option, emit, json_option
from .data_options import RowOptions, source_options


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
    from ..data.sources.containers import records

    wanted = RowOptions(preset=None, config_file=None, sets=sets, generation=None, **options)
    settings, _ = load_settings(sets=sets)
    rows = (record for source in wanted.sources() for record in records(source, seed=settings.seed))
    rejects = Rejects(Policies.of(settings))
    report = convert_records(rows, output, load_formats(), rejects=rejects)
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
