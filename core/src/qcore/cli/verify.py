"""``qcore verify``: checks the files of an adapter or merged folder against MANIFEST.json."""

from __future__ import annotations

import click

from .common import debug_option, emit, json_option


@click.command("verify")
@click.argument("folder")
@json_option
@debug_option
def command(folder: str, as_json: bool) -> None:
    """Check that FOLDER, or a hub id, holds what its manifest says, file by file."""
    from ..adapter.locate import locate_folder
    from ..errors import InputError
    from ..io.artifact import verify

    report = verify(locate_folder(folder))
    if as_json and report.ok:
        emit(report.as_json())
        return
    if report.ok:
        click.echo(f"{folder}: {report.kind}, {report.files} files as the manifest says")
        for note in report.notes:
            click.echo(f"  note: {note}")
        return
    count = len(report.problems)
    error = InputError(
        "QC-VERIFY-001",
        "is not what its manifest says",
        file=folder,
        found=f"{count} problem" + ("s" if count > 1 else ""),
        fix="restore the folder, or make it again",
    )
    if as_json:
        emit({**report.as_json(), "error": error.as_json()})
        raise click.exceptions.Exit(error.exit_code)
    for problem in report.problems:
        click.echo(f"  {problem}", err=True)
    raise error
