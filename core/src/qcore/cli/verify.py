"""``qcore verify``: a folder against its manifest, or against stock transformers and PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import debug_option, emit, json_option

if TYPE_CHECKING:
    from ..merging.stock_report import PromptResult, StockReport


@click.command("verify")
@click.argument("folder")
@click.option(
    "--against",
    type=click.Choice(["stock"]),
    help="Also compute with stock transformers and PEFT, and compare logits and the adapter's "
    "effect. The options below are for that.",
)
@click.option("--model", help="The base of an adapter or of a merged checkpoint.")
@click.option(
    "--adapter",
    help="The adapter of a merged checkpoint; by default the one that its manifest records.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Prompts to compare: JSON Lines of messages or text, or plain text; otherwise random "
    "tokens.",
)
@click.option(
    "--stock-class",
    help="Class of transformers; by default the one that PEFT's Auto classes take, or that of "
    "config.json.",
)
@click.option("--generation", default="", help="Take an unproven checkpoint for this generation.")
@json_option
@debug_option
def command(
    folder: str,
    against: str | None,
    model: str | None,
    adapter: str | None,
    prompts: Path | None,
    stock_class: str | None,
    generation: str,
    as_json: bool,
) -> None:
    """Check that FOLDER, or a hub id, holds what its manifest says, file by file."""
    options = {
        "model": model, "adapter": adapter, "prompts": prompts, "stock_class": stock_class,
        "generation": generation,
    }  # fmt: skip
    if against is None:
        _refuse_unused(options)
        _manifest(folder, as_json)
    else:
        _stock(folder, options, as_json)


def _refuse_unused(options: dict[str, Any]) -> None:
    from ..errors import UsageError

    for name, value in options.items():
        if value:
            raise UsageError(
                "QC-STOCK-002",
                "has no effect on the check of a manifest",
                field="--" + name.replace("_", "-"),
                fix="pass --against stock, or leave it out",
            )


def _manifest(folder: str, as_json: bool) -> None:
    from ..adapter.locate import locate_folder
    from ..errors import InputError
    from ..io.artifact import verify

    report = verify(locate_folder(folder))
    if as_json and report.ok:
        emit(report.as_json())
        return
    if report.ok:
        click.echo(f"{folder}: {report.kind}, {report.files} files as the manifest says")
        for note in report.notes:
            click.echo(f"  note: {note}")
        return
    count = len(report.problems)
    error = InputError(
        "QC-VERIFY-001",
        "is not what its manifest says",
        file=folder,
        found=f"{count} problem" + ("s" if count > 1 else ""),
        fix="restore the folder, or make it again",
    )
    if as_json:
        emit({**report.as_json(), "error": error.as_json()})
        raise click.exceptions.Exit(error.exit_code)
    for problem in report.problems:
        click.echo(f"  {problem}", err=True)
    raise error


def _stock(folder: str, options: dict[str, Any], as_json: bool) -> None:
    from ..adapter.locate import locate_folder
    from ..errors import PreflightError, raise_all
    from ..io.stop_signals import importing
    from .terminal import terminal_reporter

    with importing():
        from ..merging.against_stock import verify_against_stock
    # A local base has no manifest, which `locate_folder` would ask for.
    where = Path(folder) if Path(folder).is_dir() else locate_folder(folder)
    report = verify_against_stock(where, **options, reporter=terminal_reporter(quiet=as_json))
    if not as_json:
        for line in _lines(report):
            click.echo(line)
        raise_all(report.problems)
        return
    value = report.as_json()
    if report.ok:
        emit(value)
        return
    error = PreflightError(list(report.problems))
    emit({**value, "error": error.as_json()})
    raise click.exceptions.Exit(error.exit_code)


def _lines(report: StockReport) -> Iterator[str]:
    packages = ", ".join(f"{name} {version}" for name, version in report.packages.items())
    memory = "" if report.whole else ", one layer in memory at a time"
    yield (
        f"{report.folder}: {report.kind} under {report.stock_class} ({packages}; {report.dtype}"
        + (f"{memory})")
    )
    rows = [_HEAD, *(_row(prompt) for prompt in report.prompts)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_HEAD))]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        yield "  " + "  ".join(cells)
    layers = report.layers
    yield (
        f"layers: {layers['count']}, the largest difference is {layers['worst']:.2g} of what is "
        f"allowed, at {layers['at']}"
    )
    for note in report.notes:
        yield f"note: {note}"
    if report.ok:
        yield "the same as stock"


_HEAD = ("prompt", "tokens", "difference", "allowed", "KL", "top-1", "effect", "effect ratio")


def _row(prompt: PromptResult) -> tuple[str, ...]:
    effect = "" if prompt.effect is None else f"{prompt.effect:.2g}"
    ratio = "" if prompt.effect_ratio is None else f"{prompt.effect_ratio:.4f}"
    allowed = "rerouted" if prompt.rerouted else f"{prompt.bound:.1e}"
    return (
        prompt.name, str(prompt.tokens), f"{prompt.difference:.1e}", allowed, f"{prompt.kl:.1e}",
        f"{prompt.top1:.0%}", effect, ratio,
    )  # fmt: skip
