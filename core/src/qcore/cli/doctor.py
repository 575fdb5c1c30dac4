"""``qcore doctor``: prints the checks of the environment, and with ``--kernels`` every backend.

Under torchrun the first rank reports for all: what differs between them, and the links.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..io.stop_signals import importing
from .common import debug_option, emit, json_option

if TYPE_CHECKING:
    from ..api.records import Finding


@click.command("doctor")
@click.option("--kernels", is_flag=True, help="Verify every backend of every op, and list them.")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Under torchrun: compare the files of a model between ranks.",
)
@json_option
@debug_option
def command(kernels: bool, model: Path | None, as_json: bool) -> None:
    """Check the environment by running the pieces that qcore relies on."""
    if kernels:
        _kernels(as_json)
        return
    from ..parallel.world import is_rank
    from ..preflight.environment import findings
    from ..preflight.links import links
    from ..preflight.ranks import need_ranks

    if is_rank():
        _of_ranks(model, as_json)
        return
    need_ranks(model)
    _report([*findings(), *links()], as_json)


def _of_ranks(model: Path | None, as_json: bool) -> None:
    """The report of all ranks; the others are silent and end well."""
    with importing():
        from ..nn.device import pick_device
        from ..parallel.world import World
        from ..preflight.ranks import findings_of_ranks

    import torch

    device = pick_device("auto")
    with World.of_environment(device) as world:
        if device.type == "cuda":
            device = torch.device("cuda", world.local_rank)
        report = findings_of_ranks(world, device, model)
    if world.first:
        _report(report, as_json)


def _report(report: list[Finding], as_json: bool) -> None:
    from ..api.records import Severity
    from ..errors import raise_all
    from ..preflight.checks import as_error

    errors = [as_error(finding) for finding in report if finding.severity is Severity.ERROR]
    if as_json:
        rows = [
            {
                "code": finding.code,
                "severity": finding.severity.value,
                "subject": finding.field,
                "what": finding.what,
                "fix": finding.fix,
            }
            for finding in report
        ]
        emit({"ok": not errors, "findings": rows})
        raise click.exceptions.Exit(errors[0].exit_code if errors else 0)
    for finding in report:
        mark = {"error": "!!", "warning": " !", "note": "  "}[finding.severity.value]
        click.echo(f"{mark} {finding.field:<24} {finding.what}")
    raise_all(errors)


def _kernels(as_json: bool) -> None:
    """The table of backends on the device of a run."""
    from dataclasses import asdict

    from ..errors import raise_all
    from ..preflight.environment import kernel_table

    with importing():
        device, lines, problems = kernel_table()
    if as_json:
        rows = [
            {
                "op": line.op,
                "backend": line.backend,
                "state": line.state.value,
                "reason": line.reason,
                "owner": line.owner,
                "verdict": None if line.verdict is None else asdict(line.verdict),
            }
            for line in lines
        ]
        listed = [problem.as_json() for problem in problems]
        emit({"ok": not problems, "device": device, "kernels": rows, "problems": listed})
        raise click.exceptions.Exit(problems[0].exit_code if problems else 0)
    click.echo(f"kernels on {device}")
    for line in lines:
        words = [f"{line.op:<24}", f"{line.backend:<14}", f"{line.state.value:<9}"]
        if line.verdict is not None:
            words.append(line.verdict.text)
        if line.reason and (line.verdict is None or line.verdict.good):
            words.append(line.reason)
        click.echo(" ".join(words).rstrip())
    raise_all(problems)
