"""``qcore plugins``: prints installed plugins and their status from metadata, importing none.

This file decides how plugins and the entry points of other groups are listed. Their status is
decided by `qcore.plugins.discovery` and `qcore.io.entry_points`.
"""

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
    from ..io.entry_points import DISABLE, unknown_disabled
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
    others = _others()
    if as_json:
        emit({"plugins": rows, "entry_points": others})
        return
    if not rows:
        click.echo("no plugin is installed; for example: pip install qcore-<model>")
    for name, near in unknown_disabled():
        hint = f"; did you mean {near}?" if near else ""
        click.echo(f"{DISABLE} names {name}, which is not installed{hint}", err=True)
    width = max((len(row["name"] or "") for row in rows), default=0)
    for row in rows:
        reason = f"  {row['reason']}" if row["reason"] else ""
        click.echo(
            f"{row['name']:<{width}}  {row['status']:<12}  "
            f"{row['distribution']} {row['version']}{reason}"
        )
    wide = max((len(row["group"] or "") for row in others), default=0)
    long = max((len(row["name"] or "") for row in others), default=0)
    if rows and others:
        click.echo("")
    for row in others:
        reason = f"  {row['reason']}" if row["reason"] else ""
        click.echo(
            f"{row['group']:<{wide}}  {row['name']:<{long}}  {row['status']:<12}  "
            f"{row['distribution']} {row['version']}{reason}"
        )


def _others() -> list[dict[str, str | None]]:
    """The entry points of every group but those of plugins and their index, which are above."""
    from ..data.formats import BUILTIN_NAMES
    from ..io.entry_points import COMMANDS, DATA_FORMATS, GROUPS, INDEX, PLUGINS, Status, entries
    from .main import VERBS

    rows: list[dict[str, str | None]] = []
    for group in GROUPS:
        if group in (PLUGINS, INDEX):
            continue
        for entry in entries(group):
            status, reason = entry.status, entry.reason
            if group == COMMANDS and entry.name in VERBS:
                status, reason = Status.INVALID, "is a command of core"
            if group == DATA_FORMATS and entry.name in BUILTIN_NAMES:
                status, reason = Status.INVALID, "is a row format of core"
            rows.append(
                {
                    "group": group,
                    "name": entry.name,
                    "value": entry.value,
                    "distribution": entry.identity.distribution,
                    "version": entry.identity.version,
                    "status": status.value,
                    "reason": reason,
                }
            )
    return rows
