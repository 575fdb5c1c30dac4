"""``qcore adapter combine``: writes the weighted sum of adapters, and prints its error."""

from __future__ import annotations

from pathlib import Path

import click

from ..io.stop_signals import importing
from .common import debug_option, emit, json_option


@click.command("combine")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--model", default="", help="The base; by default the one that the adapters name.")
@click.option(
    "--rank", type=click.IntRange(1, 65536), help="Approximate with this rank; else exact."
)
@click.option("--adapter-class", default="", help="Class whose module names the adapter has.")
@click.option(
    "--trust-generation",
    is_flag=True,
    help="Accept an adapter that names a base of another generation.",
)
@click.option("--generation", default="", help="Take an unproven base for this generation.")
@json_option
@debug_option
def combine(
    adapters: tuple[str, ...],
    output: Path,
    model: str,
    rank: int | None,
    adapter_class: str,
    trust_generation: bool,
    generation: str,
    as_json: bool,
) -> None:
    """Write the sum of adapters, each with its weight (1), as one adapter."""
    with importing():
        from ..merging.combine import combine as run
    from .terminal import show, terminal_reporter
    from .weighted import weighted_adapters

    report = run(
        weighted_adapters(adapters),
        output,
        model=model,
        rank=rank,
        adapter_class=adapter_class,
        trust_generation=trust_generation,
        generation=generation,
        reporter=terminal_reporter(quiet=as_json),
    )
    if as_json:
        emit(report.as_json())
        return
    ranks = sorted({weight.r for weight in report.weights.values()})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    exact = "exact" if rank is None else f"the sum differs by {report.relative_error:.2g}"
    click.echo(f"{report.output}: {len(report.weights)} LoRA pairs of rank {shown}; {exact}")
    for part in report.adapters:
        click.echo(f"  {part.weight:g} x {part.adapter}: {part.pairs} pairs, norm {part.norm:.3g}")
    if rank is not None:
        show("", [
            {"tensor": name, "r": str(weight.r), "norm": f"{weight.norm:.4g}",
             "relative error": f"{weight.relative_error:.2g}"}
            for name, weight in report.weights.items()
        ])  # fmt: skip
