"""``qcore doctor``."""

from __future__ import annotations

import click

from .common import debug_option, emit, json_option


@click.command("doctor")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """Check the environment by running the pieces that qcore relies on."""
    from ..doctor import findings
    from ..errors import raise_all
    from ..preflight import as_error
    from ..records import Severity

    found = list(findings())
    errors = [as_error(finding) for finding in found if finding.severity is Severity.ERROR]
    if as_json:
        rows = [
            {
                "code": finding.code,
                "severity": finding.severity.value,
                "subject": finding.field,
                "what": finding.what,
                "fix": finding.fix,
            }
            for finding in found
        ]
        emit({"ok": not errors, "findings": rows})
        raise click.exceptions.Exit(errors[0].exit_code if errors else 0)
    for finding in found:
        mark = {"error": "!!", "warning": " !", "note": "  "}[finding.severity.value]
        click.echo(f"{mark} {finding.field:<24} {finding.what}")
    raise_all(errors)
