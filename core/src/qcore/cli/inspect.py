"""``qcore inspect``: prints what a checkpoint is and whether every tensor is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import count, debug_option, emit, json_option

if TYPE_CHECKING:
    from ..preflight.inspect import InspectReport, RecordComparison


@click.command("inspect")
@click.argument("model")
@click.option("--generation", default="", help="Take an unproven checkpoint for this generation.")
@click.option(
    "--for",
    "uses",
    multiple=True,
    type=click.Choice(["train", "merge", "serve"]),
    help="A use that MODEL must be fit for; repeatable. By default findings of all are shown.",
)
@json_option
@debug_option
def command(model: str, generation: str, uses: tuple[str, ...], as_json: bool) -> None:
    """Report what MODEL is, by which evidence, and whether every tensor is accounted for."""
    from ..preflight.inspect import inspect

    report = inspect(model, generation=generation, uses=uses)
    if as_json:
        emit(report.as_json())
        if report.errors:  # the error is a part of the object on stdout
            raise click.exceptions.Exit(report.errors[0].exit_code)
        return
    _print(report)
    report.raise_problems()


def _print(report: InspectReport) -> None:
    click.echo(
        f"{report.model}: {report.architecture}, generation {report.generation} "
        f"(plugin {report.plugin})"
    )
    for line in report.evidence:
        click.echo(f"  evidence    {line}")
    click.echo(f"  modalities  {', '.join(report.modalities)}")
    if report.quantization:
        click.echo(f"  quantized   {report.quantization['line']}")
    if report.parameters is not None:
        _print_tensors(report)
    for line in report.differences:
        click.echo(f"  difference  {line}")
    _print_record(report.record)
    if report.parameters is not None and not report.problems:
        click.echo("  every tensor is accounted for")
    for finding in report.findings:
        click.echo(
            f"  finding     {finding.severity} for {', '.join(finding.uses)}: "
            f"[{finding.error.code}] {finding.error.message}"
        )


def _print_tensors(report: InspectReport) -> None:
    click.echo(f"  parameters  {report.parameters:,} in {report.tensors} tensors")
    layouts = ", ".join(f"{part} {layout}" for part, layout in report.layouts.items())
    click.echo(f"  layout      {layouts}")
    for group, size in report.groups.items():
        click.echo(f"    {group:<10} {size.tensors:>5} tensors  {count(size.parameters)}")
    for root, number in report.carried.items():
        click.echo(f"  carried     {number} tensors under {root}: no plugin claims them")


def _print_record(record: RecordComparison) -> None:
    """What differs from the record of the SKU, with how reliable the record is."""
    differences = record.differences
    if record.id:
        many = f"{len(differences)} differences" if len(differences) != 1 else "1 difference"
        click.echo(f"  record      {record.id}: {many if differences else 'no difference'}")
    if record.note:
        click.echo(f"  record      {record.note}")
    for difference in differences:
        click.echo(f"    {difference.line()} ({difference.mark.value})")
    for line in record.unread:
        click.echo(f"  record      those of {line}")
