"""``qcore inspect``: what a model is, told from config and headers alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from .common import count, debug_option, emit, json_option

_BY_NAME = ("QC-KEY-001", "QC-KEY-002", "QC-KEY-004")  # a tensor is absent, or is nobody's


@click.command("inspect")
@click.argument("model")
@click.option("--generation", default="", help="Take an unproven checkpoint for this generation.")
@json_option
@debug_option
def command(model: str, generation: str, as_json: bool) -> None:
    """Say what MODEL is, by which evidence, and whether every tensor is accounted for."""
    from ..checkpoint.safetensors_header import without_gc

    with without_gc():
        _inspect(model, generation, as_json)


def _inspect(model: str, generation: str, as_json: bool) -> None:
    from ..checkpoint.layout import faults
    from ..errors import raise_all
    from ..plugins.resolve_model import identify
    from ..skus.compare import compare, part_layouts
    from ..skus.registry import load_skus

    found = identify(model, generation=generation, tolerant=True, headers_only=True)
    decision, layout = found.decision, found.layout
    # A refused format is a problem of no tensor: the error alone reports it.
    problems = () if found.refused is not None else found.problems
    unaccounted = [error for error in problems if error.code in _BY_NAME]
    differences = [error.message for error in problems if error.code not in _BY_NAME]
    differences += [
        f"part '{part}' is claimed by config.json and absent from the files"
        for part in layout.absent
    ]
    quantised = found.quantisation
    unreadable = quantised is not None and not quantised.readable
    skus = load_skus()
    beside = compare(
        found.checkpoint, decision.architecture.name, decision.generation.name, layout, skus
    )
    report: dict[str, Any] = {
        "architecture": decision.architecture.name,
        "generation": decision.generation.name,
        "plugin": decision.plugin.name,
        "evidence": list(decision.evidence),
        "modalities": ["text", *(kind for one in found.modalities for kind in one.kinds)],
        "parameters": None if unreadable else layout.parameters,
        "quantisation": quantised.as_json() | {"line": quantised.line()} if quantised else None,
        "tensors": len(found.checkpoint.headers),
        "unaccounted": [error.field for error in unaccounted],
        "differences": differences,
        "carried": layout.carried_roots(),
        "namespaces": {part: namespace.name for part, namespace in layout.namespaces.items()},
        "layouts": part_layouts(layout),
        "groups": {
            group: {"tensors": tensors, "parameters": parameters}
            for group, (tensors, parameters) in layout.groups().items()
        },
        "revision": found.checkpoint.revision,
        "record": {
            "id": beside.sku.id if beside.sku else None,
            "note": beside.note,
            "differences": [asdict(one) for one in beside.differences],
            "unread": [f"{bad.origin}: {bad.reason}" for bad in skus.broken],
        },
    }
    if found.problems:
        report["error"] = faults(found.problems)[0].as_json()
    if as_json:
        emit(report)
    else:
        _print(model, report, [one.line() for one in beside.differences])
    if found.problems:
        # The report is on stdout; under --json the exit status alone says that it is not whole.
        if as_json:
            raise click.exceptions.Exit(found.problems[0].exit_code)
        raise_all(faults(found.problems))


def _print(model: str, report: dict[str, Any], differs: list[str]) -> None:
    click.echo(
        f"{model}: {report['architecture']}, generation {report['generation']} "
        f"(plugin {report['plugin']})"
    )
    for line in report["evidence"]:
        click.echo(f"  evidence    {line}")
    click.echo(f"  modalities  {', '.join(report['modalities'])}")
    if report["quantisation"]:
        click.echo(f"  quantised   {report['quantisation']['line']}")
    if report["parameters"] is not None:
        _print_tensors(report)
    for line in report["differences"]:
        click.echo(f"  difference  {line}")
    _print_record(report["record"], differs)
    if report["parameters"] is not None and not (report["unaccounted"] or "error" in report):
        click.echo("  every tensor is accounted for")


def _print_tensors(report: dict[str, Any]) -> None:
    click.echo(f"  parameters  {report['parameters']:,} in {report['tensors']} tensors")
    layouts = ", ".join(f"{part} {way}" for part, way in report["layouts"].items())
    click.echo(f"  layout      {layouts}")
    for group, sizes in report["groups"].items():
        click.echo(f"    {group:<10} {sizes['tensors']:>5} tensors  {count(sizes['parameters'])}")
    for root, number in report["carried"].items():
        click.echo(f"  carried     {number} tensors under {root}: no plugin claims them")


def _print_record(record: dict[str, Any], differs: list[str]) -> None:
    """What the record of the SKU says otherwise, with how well the record knows it."""
    if record["id"]:
        many = f"{len(differs)} differences" if len(differs) != 1 else "1 difference"
        click.echo(f"  record      {record['id']}: {many if differs else 'no difference'}")
    if record["note"]:
        click.echo(f"  record      {record['note']}")
    for line, difference in zip(differs, record["differences"], strict=True):
        click.echo(f"    {line} ({difference['mark'].value})")
    for line in record["unread"]:
        click.echo(f"  record      those of {line}")
