"""``qcore plugins``."""

from __future__ import annotations

import click

from .common import debug_option, emit, json_option


@click.group("plugins")
def command() -> None:
    """What is installed, and what is broken and why."""


@command.command("list")
@json_option
@debug_option
def list_plugins(as_json: bool) -> None:
    """List the installed plugins by their metadata; none is imported."""
    from ..plugins.manager import Plugins

    rows = [
        {
            "name": info.name,
            "distribution": info.distribution,
            "version": info.version,
            "status": info.status.value,
            "reason": info.reason,
        }
        for info in Plugins.discover().infos
    ]
    if as_json:
        emit({"plugins": rows})
        return
    if not rows:
        click.echo("no plugin is installed; for example: pip install qcore-<model>")
    width = max((len(row["name"] or "") for row in rows), default=0)
    for row in rows:
        reason = f"  {row['reason']}" if row["reason"] else ""
        click.echo(
            f"{row['name']:<{width}}  {row['status']:<12}  "
            f"{row['distribution']} {row['version']}{reason}"
        )
