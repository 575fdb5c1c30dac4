"""``qcore inspect``: prints what a checkpoint is and whether every tensor is known."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Final

import click

from .common import count, debug_option, emit, json_option

if TYPE_CHECKING:
    from ..preflight.inspect import InspectReport, RecordComparison

_FIELD: Final = 12  # width of the names of fields


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
        _field("evidence", line)
    _field("modalities", ", ".join(report.modalities))
    if report.quantization:
        _field("quantized", report.quantization["line"])
    if report.parameters is not None:
        _print_tensors(report)
    for line in report.differences:
        _field("difference", line)
    _print_record(report.record)
    if report.parameters is not None and not report.problems:
        click.echo("  every tensor is accounted for")
    for finding in report.findings:
        error = finding.error
        fix = f". Fix: {error.fix}" if error.fix else ""
        uses = ", ".join(finding.uses)
        _field("finding", f"{finding.severity} for {uses}: [{error.code}] {error.message}{fix}")


def _field(name: str, text: str) -> None:
    """Print a field: folded below itself on a terminal, one line in a pipe."""
    if not sys.stdout.isatty():
        click.echo(f"  {name:<{_FIELD}}{text}")
        return
    width = max(2 * _FIELD, shutil.get_terminal_size().columns)
    click.echo(
        textwrap.fill(
            text, width, initial_indent=f"  {name:<{_FIELD}}", subsequent_indent=" " * (_FIELD + 2),
            break_long_words=False, break_on_hyphens=False,
        )
    )  # fmt: skip


def _print_tensors(report: InspectReport) -> None:
    _field("parameters", f"{report.parameters:,} in {report.tensors} tensors")
    layouts = ", ".join(f"{part} {layout}" for part, layout in report.layouts.items())
    _field("layout", layouts)
    for group, size in report.groups.items():
        click.echo(f"    {group:<10} {size.tensors:>5} tensors  {count(size.parameters)}")
    for root, number in report.carried.items():
        _field("carried", f"{number} tensors under {root}: no plugin claims them")


def _print_record(record: RecordComparison) -> None:
    """What differs from the record of the SKU, with how reliable the record is."""
    differences = record.differences
    if record.id:
        many = f"{len(differences)} differences" if len(differences) != 1 else "1 difference"
        _field("record", f"{record.id}: {many if differences else 'no difference'}")
    if record.note:
        _field("record", record.note)
    for difference in differences:
        click.echo(f"    {difference.line()} ({difference.mark.value})")
    for line in record.unread:
        _field("record", f"those of {line}")
