"""``qcore plan``: prints predicted memory, micro-batch and speed of training for each GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .common import count as short
from .common import debug_option, emit, json_option, spoken

if TYPE_CHECKING:
    from ..planning import Plan
    from ..preflight.plan import GpuPlan, PlanReport


class Count(click.types.IntParamType):
    """A number of GPUs."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse a name, which another option takes."""
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is not a number; --gpu NAME names a kind of GPU", param, ctx)


@click.command("plan")
@click.argument("model")
@click.option("--max-length", type=int, help="Tokens of a row; every row is taken to have as many.")
@click.option("--rows", type=int, help="Rows of a micro-batch; by default the fastest.")
@click.option(
    "--media",
    type=int,
    metavar="UNITS",
    help="Units that the tower reads for each row.",
)
@click.option("--r", type=int, help="Rank of the LoRA matrices.")
@click.option("--groups", help="LoRA groups, comma-separated; by default those that are on.")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="A kind of GPU; repeatable.")
@click.option(
    "--gpus", "count", type=Count(), metavar="N", help="GPUs of each machine; see --gpu for names."
)
@click.option("--nodes", type=int, metavar="M", help="Machines with as many GPUs each.")
@click.option("--link", type=float, metavar="GB/s", help="Rate between GPUs of a machine.")
@click.option("--network", type=float, metavar="GB/s", help="Rate between machines; default 10.")
@click.option("--budget", default="auto", metavar="GB|auto", help="Memory that may be filled.")
@click.option("--preset", help="Named settings; see qcore presets list.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="run.yaml")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable.")
@click.option("--generation", help="Take an unproven checkpoint for this generation.")
@json_option
@debug_option
def command(
    model: str,
    max_length: int | None,
    rows: int | None,
    media: int | None,
    r: int | None,
    groups: str | None,
    gpus: tuple[str, ...],
    count: int | None,
    nodes: int | None,
    link: float | None,
    network: float | None,
    budget: str,
    preset: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
    generation: str | None,
    as_json: bool,
) -> None:
    """Predict memory and speed of training MODEL on a GPU, before a weight is read."""
    from ..config.resolve import load_settings
    from ..preflight.plan import plan

    flags: dict[str, tuple[str, str | int | None]] = {
        "--max-length": ("max_length", max_length),
        "--rows": ("per_device_train_batch_size", rows),
        "--r": ("r", r),
        "--groups": ("target_groups", groups),
        "--generation": ("generation", generation),
    }
    settings, _ = load_settings(preset=preset, config_file=config_file, sets=sets, flags=flags)
    with spoken(flags):
        report = plan(
            model, settings, gpus=gpus, budget=budget, media=media, fixed_rows=rows is not None,
            gpu_count=count, nodes=nodes, link=link, network=network,
        )  # fmt: skip
    if as_json:
        emit(report.as_json())
        return
    _print(report)


def _print(report: PlanReport) -> None:
    click.echo(f"{report.model}: {short(report.trained_parameters)} trained parameters")
    _print_gpus(report)
    _print_ranks(report)
    _print_memory(report.plans[0].plan)
    for line in (*report.notes, *_notes(report.plans)):
        click.echo(line, err=True)


def _print_gpus(report: PlanReport) -> None:
    """A line for each GPU."""
    longest = f"longest row ({report.plans[0].longest_row_recompute})"
    rows: list[list[Any]] = [
        ["card", "budget", "micro-batch", "recompute", "peak", "s", "tokens/s", longest]
    ]
    for gpu in report.plans:
        plan = gpu.plan
        rows.append(
            [
                plan.card,
                _gb(plan.budget),
                f"{len(plan.lengths)} x {max(plan.lengths)}"
                + (f" + {plan.units:,} units" if report.media_units else ""),
                plan.recompute if plan.fits else f"does not fit ({plan.recompute})",
                _gb(plan.peak),
                f"{plan.seconds:.2f}" if plan.fits else "",
                f"{plan.tokens_per_second:,.0f}" if plan.fits else "",
                f"{gpu.longest_row:,}",
            ]
        )
    _print_table(rows)


def _print_ranks(report: PlanReport) -> None:
    """A line for each kind of GPU: the step that several of them share."""
    shared = [gpu.shared for gpu in report.plans if gpu.shared is not None]
    if not shared:
        return
    ranks = shared[0].ranks
    machines = f" on {ranks.nodes} machines" if ranks.nodes > 1 else ""
    click.echo(f"\na step of {ranks.size} GPUs{machines}:")
    rows = [
        ["card", "base", "packs", "of a GPU", "idle", "s", "tokens/s of a GPU", "in all", "scaling"]
    ]
    for step in shared:
        fits = step.usual.fits
        rows.append(
            [
                step.usual.card,
                "sharded" if step.sharded else "whole",
                f"{step.packs:g}",
                f"{step.load:g}",
                f"{step.idle:.0%}",
                f"{step.seconds:.2f}" if fits else "",
                f"{step.per_gpu:,.0f}" if fits else "",
                f"{step.tokens_per_second:,.0f}" if fits else "",
                f"{step.scaling:.1%}" if fits else "",
            ]
        )
    _print_table(rows)


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _print_memory(plan: Plan) -> None:
    """The peak by term, and its activations and workspace by op."""
    click.echo(f"\n{plan.card}, GB at the peak ({plan.moment}):")
    for term, size in plan.memory.items():
        if size:
            click.echo(f"  {term:<28} {size / 1e9:8.3f}")
    for op, size in sorted(plan.ops.items(), key=lambda item: -item[1]):
        if size >= 1e6:
            click.echo(f"    of that {op:<20} {size / 1e9:8.3f}")
    click.echo(f"  {'in all':<28} {plan.peak / 1e9:8.3f}")


def _notes(plans: tuple[GpuPlan, ...]) -> Iterator[str]:
    """The notes of each plan, each once, and what would fit where a plan does not."""
    printed: set[str] = set()
    for gpu in plans:
        card = gpu.plan.card
        for note in gpu.plan.notes:
            if note not in printed:
                printed.add(note)
                yield f"note: {note}" if gpu is plans[0] else f"note: {card}: {note}"
        if gpu.shared is not None:
            yield f"note: {card}: {gpu.shared.reason}; {gpu.shared.communication()}"
            if (balance := gpu.shared.balance()) is not None and balance not in printed:
                printed.add(balance)
                yield f"note: {balance}"
        if not gpu.plan.fits:
            yield f"note: {card}: does not fit; {gpu.fix}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2g}"
