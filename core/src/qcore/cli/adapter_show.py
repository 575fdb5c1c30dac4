"""``qcore adapter show``: prints what an adapter folder holds, and what of it fits a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from .common import count, debug_option, emit, json_option

if TYPE_CHECKING:
    from ..adapter.show import AdapterReport, Targets

_SHOWN = 3  # names in a line


@click.command("show")
@click.argument("adapter")
@click.option("--model", help="A base: also report what of the adapter fits it.")
@click.option("--generation", default="", help="Take an unproven base for this generation.")
@click.option("--norms", is_flag=True, help="Also read the matrices, for the norms of the deltas.")
@json_option
@debug_option
def show(adapter: str, model: str | None, generation: str, norms: bool, as_json: bool) -> None:
    """Report what ADAPTER, a folder or a hub id, holds."""
    from ..adapter.show import show_adapter

    if generation and model is None:
        from ..errors import UsageError

        raise UsageError(
            "QC-CLI-011", "has no effect without a base", field="--generation", fix="pass --model"
        )
    report = show_adapter(adapter, model=model, generation=generation, norms=norms)
    if as_json:
        emit(report.as_json())
        if report.problems:  # the error is a part of the object on stdout
            raise click.exceptions.Exit(report.problems[0].exit_code)
        return
    _print(report)
    from ..errors import one_of_each, raise_all

    raise_all(one_of_each(report.problems))


def _print(report: AdapterReport) -> None:
    from .terminal import show as show_table

    facts = report.as_json()
    for line in _head(facts):
        click.echo(line)
    if report.targets:
        show_table("", [_row(targets) for targets in report.targets])
    for line in _rest(facts, report):
        click.echo(line)


def _head(facts: Mapping[str, Any]) -> Iterator[str]:
    version = f", PEFT {facts['peft_version']}" if facts["peft_version"] else ""
    yield f"{facts['adapter']}: {facts['kind']}{version}"
    yield f"  base        {facts['base'] or 'not named'}"
    if (recorded := facts["recorded"]) is not None:
        yield f"  recorded    {recorded['verb']} of {recorded['model']} by qcore"
    yield f"  rank        r {facts['r']}, lora_alpha {facts['lora_alpha']}"
    for field in ("rank_pattern", "alpha_pattern"):
        if facts[field]:
            yield f"  {field}  {_listed([f'{k}: {v}' for k, v in facts[field].items()])}"
    for field in ("target_modules", "target_parameters"):
        if facts[field]:
            names = facts[field]
            yield f"  {field}  {_listed(names) if isinstance(names, list) else names}"
    yield f"  tensors     {facts['tensors']:,}, {count(facts['parameters'])} parameters"


def _row(targets: Targets) -> dict[str, Any]:
    row = {
        "target": targets.name or "(fits no weight)",
        "pairs": targets.pairs,
        "r": _span([str(r) for r in targets.ranks]),
        "scaling": _span([f"{value:.4g}" for value in targets.scalings]),
        "parameters": count(targets.parameters),
        "dtype": ", ".join(targets.dtypes),
    }
    if targets.norm is not None:
        row |= {"norm": f"{targets.norm:.4g}", "largest": f"{targets.largest:.4g}"}
    return row


def _span(values: list[str]) -> str:
    """The values of a list, or its first and last."""
    return ", ".join(values) if len(values) <= _SHOWN else f"{values[0]} to {values[-1]}"


def _rest(facts: Mapping[str, Any], report: AdapterReport) -> Iterator[str]:
    if saved := facts["saved"]:
        yield f"  saved       {_listed([f'{name} {shape}' for name, shape in saved.items()])}"
    for module, rows in facts["token_rows"].items():
        yield f"  token rows  {rows} of {module}"
    if facts["tokenizer"]:
        yield f"  tokenizer   {', '.join(facts['tokenizer'])}"
    for template in facts["templates"]:
        name = "" if template["name"] == "default" else f" '{template['name']}'"
        yield f"  template   {name} {template['file']} (sha256 {template['sha256'][:12]})"
    for line in facts["refused"]:
        yield f"  not usable  {line}"
    for line in facts["notes"]:
        yield f"  note        {line}"
    fit = report.fit
    if fit is None:
        return
    for line in fit.lines:
        yield f"  note        {line}"
    if fit.matched is None:
        yield f"  fits        {fit.model}: not matched"
        return
    ignored = f", {fit.ignored} as in the base" if fit.ignored else ""
    yield (
        f"  fits        {fit.model} (generation {fit.generation}): {fit.matched} tensors change "
        f"{fit.weights} weights{ignored}, {len(fit.unmatched)} unmatched"
    )
    if fit.unmatched:
        yield f"  unmatched   {_listed(fit.unmatched)}"


def _listed(names: Any) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, [*names][:_SHOWN])) + more
