"""``qcore adapter extract``: writes the adapter between two checkpoints, and prints its error."""

from __future__ import annotations

from pathlib import Path

import click

from ..io.stop_signals import importing
from .common import debug_option, emit, json_option

_SHOWN = 5  # tensors that a line names


@click.command("extract")
@click.option("--base", required=True, help="The base: a folder or a hub id.")
@click.option("--model", required=True, help="The tuned checkpoint: a folder or a hub id.")
@click.option("--rank", required=True, type=click.IntRange(1, 65536), help="Rank of each pair.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--partial",
    is_flag=True,
    help="Leave out tensors that differ and that LoRA cannot change: norms, embeddings.",
)
@click.option("--adapter-class", default="", help="Class whose module names the adapter has.")
@click.option("--generation", default="", help="Take unproven checkpoints for this generation.")
@json_option
@debug_option
def extract(
    base: str,
    model: str,
    rank: int,
    output: Path,
    partial: bool,
    adapter_class: str,
    generation: str,
    as_json: bool,
) -> None:
    """Write the LoRA adapter of a rank that brings BASE closest to MODEL."""
    with importing():
        from ..merging.extract import extract as run
    from .terminal import show, terminal_reporter

    report = run(
        base,
        model,
        output,
        r=rank,
        partial=partial,
        adapter_class=adapter_class,
        generation=generation,
        reporter=terminal_reporter(quiet=as_json),
    )
    if as_json:
        emit(report.as_json())
        return
    click.echo(
        f"{report.output}: {len(report.weights)} LoRA pairs of rank {report.r}; they leave "
        f"{report.relative_error:.2g} of the difference of the checkpoints"
    )
    show("", [
        {**line, "norm": f"{line['norm']:.4g}", "relative_error": f"{line['relative_error']:.2g}",
         "largest_relative_error": f"{line['largest_relative_error']:.2g}"}
        for line in report.groups()
    ])  # fmt: skip
    if left := report.left_out:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        click.echo(f"left out: {', '.join([*left][:_SHOWN])}{more}")
