"""``qcore verify``."""

from __future__ import annotations

from pathlib import Path

import click

from .common import debug_option, emit, json_option


@click.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
@debug_option
def command(folder: Path, as_json: bool) -> None:
    """Check that FOLDER holds what its manifest says, file by file."""
    from ..artifact import verify
    from ..errors import InputError

    report = verify(folder)
    if as_json:
        emit({"ok": report.ok, "files": report.files, "problems": report.problems})
        raise click.exceptions.Exit(0 if report.ok else InputError.exit_code)
    if report.ok:
        click.echo(f"{folder}: {report.kind}, {report.files} files as the manifest says")
        return
    for problem in report.problems:
        click.echo(f"  {problem}", err=True)
    count = len(report.problems)
    raise InputError(
        "QC-VERIFY-001",
        "is not what its manifest says",
        file=folder,
        found=f"{count} problem" + ("s" if count > 1 else ""),
        fix="restore the folder, or make it again",
    )
