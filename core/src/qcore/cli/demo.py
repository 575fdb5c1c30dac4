"""``qcore demo``: trains, merges and verifies a tiny model; prints answers before and after."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from ..io.stop_signals import importing
from .common import debug_option, emit, json_option


@click.command("demo")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder to keep; else a temporary one."
)
@click.option("--architecture", default="", help="Of the tiny checkpoint; else the first.")
@json_option
@debug_option
def command(output: Path | None, architecture: str, as_json: bool) -> None:
    """Train, merge and verify a tiny checkpoint, and show one prompt before and after."""
    with importing():
        from ..demo import demo
    from .terminal import terminal_reporter

    reporter = terminal_reporter(quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="qcore-demo-") as temporary:
        report = demo(
            output or Path(temporary) / "demo", architecture=architecture, reporter=reporter
        )
    if as_json:
        emit(
            {
                "folder": str(report.folder) if output else None,
                "first_loss": report.trained.first_loss,
                "last_loss": report.trained.last_loss,
                "merged": report.merged.as_json(),
                "prompt": report.prompt,
                "before": report.before,
                "after": report.after,
            }
        )
        return
    click.echo(f"loss    {report.trained.first_loss:.3f} -> {report.trained.last_loss:.3f}")
    click.echo(f"prompt  {report.prompt}")
    click.echo(f"before  {report.before!r}")
    click.echo(f"after   {report.after!r}")
    if output:
        click.echo(f"kept in {report.folder}: base, data.jsonl, adapter, merged")
