"""``qcore data check``: all findings on the rows of a run, in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .common import debug_option, emit_list, json_option
from .data_options import RowOptions, end, model_option, setting_options, source_options

if TYPE_CHECKING:
    from ..data.views.check import CheckReport, FindingLine

_ROWS = 5  #: rows that a line names


@click.command("check")
@source_options
@model_option
@setting_options
@json_option
@debug_option
def check(model: str, as_json: bool, **options: Any) -> None:
    """Check FILES as training with MODEL would read them, and report all findings."""
    from ..data.views.check import check_rows
    from .terminal import terminal_reporter

    rows = RowOptions(**options)
    reporter = terminal_reporter(quiet=as_json)
    opened = rows.open(model, reporter)
    sources = rows.sources()
    size = sum(path.stat().st_size for source in sources for path in source.files if path.exists())
    with (
        reporter.progress("check", size, "bytes") as advance,
        opened.renderer(advance=advance) as renderer,
    ):
        report = check_rows(renderer, sources)
    if as_json:
        emit_list(report.as_json(), "findings", (f.as_json() for f in report.findings()))
    else:
        _print(report)
    end(report.error)


def _print(report: CheckReport) -> None:
    formats = ", ".join(f"{name} {count:,}" for name, count in report.formats.items())
    share = f" ({100 * report.supervised / report.tokens:.0f} %)" if report.tokens else ""
    click.echo(f"rows        {report.rows:,}, {report.rejected:,} of them refused")
    click.echo(f"formats     {formats or 'none'}")
    click.echo(f"samples     {report.samples:,}, the longest has {report.longest:,} tokens")
    click.echo(f"tokens      {report.tokens:,}, {report.supervised:,} of them supervised{share}")
    if not report.lines:
        click.echo("no findings")
        return
    from .data_view import print_findings

    print_findings([_row(line) for line in report.lines])


def _row(line: FindingLine) -> dict[str, Any]:
    named = ", ".join(map(str, line.rows[:_ROWS])) + (", ..." if len(line.rows) > _ROWS else "")
    return {
        "severity": line.severity,
        "code": line.code,
        "findings": line.count,
        "rows": named or "all",
        "message": line.message,
        "fix": line.fix,
    }
