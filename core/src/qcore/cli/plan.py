"""``qcore plan``: what training a model will take, told from config and headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from ..preflight.modality import with_tower
from .common import count, debug_option, emit, importing, json_option, spoken

if TYPE_CHECKING:
    from ..config.settings import Settings
    from ..planning import Plan, Planner
    from ..plugins.resolve_model import Identified


@click.command("plan")
@click.argument("model")
@click.option("--max-length", type=int, help="Tokens of a row; every row is taken as long.")
@click.option("--rows", type=int, help="Rows of a micro-batch; by default the fastest.")
@click.option(
    "--media", type=int, metavar="UNITS", help="Units that a tower computes for each row."
)
@click.option("--r", type=int, help="Rank of the LoRA matrices.")
@click.option("--groups", help="LoRA groups, comma-separated; by default those that are on.")
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="A card; repeatable.")
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
    budget: str,
    preset: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
    generation: str | None,
    as_json: bool,
) -> None:
    """Say what training MODEL takes of a card, before a weight is read."""
    from ..config.resolve import load_settings
    from ..planning.gpus import CARDS, capped, named, parse_budget
    from ..plugins.resolve_model import identify
    from ..preflight.checks import preflight

    flags: dict[str, tuple[str, str | int | None]] = {
        "--max-length": ("max_length", max_length),
        "--rows": ("per_device_train_batch_size", rows),
        "--r": ("r", r),
        "--groups": ("target_groups", groups),
        "--generation": ("generation", generation),
    }
    settings, _ = load_settings(preset=preset, config_file=config_file, sets=sets, flags=flags)
    cards = list(dict.fromkeys(map(named, gpus))) or list(CARDS)
    budgets, capping = capped(cards, parse_budget(budget))
    found = identify(model, generation=settings.generation, headers_only=True)
    found = found.quantizing(settings.quantize_groups)
    with spoken(flags):
        found = _loading(found, settings, media)
    told = [*preflight(found, verb="plan", settings=settings)]
    told += [f"note: {line}" for line in capping]
    with importing():
        from ..planning import Planner

    with spoken(flags):
        planner = Planner(found, settings, cards[0])
        units = _units(planner, settings, media)
        each = [planner.on(card, limit) for card, limit in zip(cards, budgets)]
        found_plans = [(one, _plan(one, settings, units, fixed=rows is not None)) for one in each]
    if as_json:
        emit(
            {
                "model": model,
                "trained_parameters": planner.trained,
                "notes": told,
                "plans": [
                    plan.as_json()
                    | {
                        "longest_row": one.longest(units=units),
                        "longest_row_recompute": one.frugal,
                    }
                    for one, plan in found_plans
                ],
            }
        )
        return
    _print(model, planner, found_plans, told, units)


def _loading(found: Identified, settings: Settings, media: int | None) -> Identified:
    """The model as a run would load it: with its tower if rows have media.

    Raises:
        UsageError: ``QC-PLAN-007`` nothing reads media for it; what `with_tower` raises.
    """
    modality = found.modality
    if media is not None and modality is None:
        raise UsageError(
            "QC-PLAN-007",
            "nothing that is installed reads media for this model",
            field="--media",
            found=media,
            fix="leave --media out, or install the plugin of its modality",
        )
    kinds = () if modality is None or media is None else modality.kinds
    found, _ = with_tower(
        found, settings.target_groups, kinds, quantized=settings.quantize_groups,
        fix="leave the group out, or pass --media UNITS",
    )  # fmt: skip
    return found


def _units(planner: Planner, settings: Settings, media: int | None) -> int:
    """Units of a row; their tokens are among the row's.

    Raises:
        UsageError: ``QC-PLAN-008``.
    """
    from ..data.microbatches import extent
    from ..planning.packs import MOST

    if media is None:
        return 0
    if media < 1:
        raise UsageError(
            "QC-PLAN-008",
            "is no number of units",
            field="--media",
            found=media,
            expected="at least 1",
            fix="leave --media out for rows of text",
        )
    # Before a unit of it is counted: what counts them takes memory for each.
    if media > (most := MOST - extent([settings.max_length])):
        raise UsageError(
            "QC-PLAN-008",
            "is more than kernels can number in a row",
            field="--media",
            found=f"{media} units beside {settings.max_length} tokens",
            expected=f"at most {max(most, 0)}",
            fix="take fewer or smaller media in a row",
        )
    if (tokens := planner.tokens(media)) > settings.max_length:
        raise UsageError(
            "QC-PLAN-008",
            "is more than a row can hold",
            field="--media",
            found=f"{media} units, which are {tokens} tokens",
            expected=f"at most {settings.max_length} tokens",
            fix=f"pass --max-length {tokens} or more",
        )
    return media


def _plan(planner: Planner, settings: Settings, units: int, *, fixed: bool) -> Plan:
    from ..planning.report import Pack

    size = settings.per_device_train_batch_size
    if fixed:
        return planner.fastest(Pack((settings.max_length,) * size, units * size))
    return planner.best(settings.max_length, size * settings.gradient_accumulation_steps, units)


def _print(
    model: str,
    planner: Planner,
    plans: list[tuple[Planner, Plan]],
    told: Sequence[str],
    units: int,
) -> None:
    first = plans[0][1]
    click.echo(f"{model}: {count(planner.trained)} trained parameters")
    rows: list[list[Any]] = [
        ["card", "budget", "micro-batch", "recompute", "peak", "s", "tokens/s"]
    ]
    rows[0].append(f"longest row ({planner.frugal})")
    for one, plan in plans:
        rows.append(
            [
                plan.card,
                _gb(plan.budget),
                f"{len(plan.lengths)} x {max(plan.lengths)}"
                + (f" + {plan.units:,} units" if units else ""),
                plan.recompute if plan.fits else f"does not fit ({plan.recompute})",
                _gb(plan.peak),
                f"{plan.seconds:.2f}" if plan.fits else "",
                f"{plan.tokens_per_second:,.0f}" if plan.fits else "",
                f"{one.longest(units=units):,}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    click.echo(f"\n{first.card}, GB at the peak ({first.moment}):")
    for term, size in first.memory.items():
        if size:
            click.echo(f"  {term:<28} {size / 1e9:8.3f}")
    for op, size in sorted(first.ops.items(), key=lambda one: -one[1]):
        if size >= 1e6:
            click.echo(f"    of that {op:<20} {size / 1e9:8.3f}")
    click.echo(f"  {'in all':<28} {first.peak / 1e9:8.3f}")
    for line in (*told, *_notes(plans)):
        click.echo(line, err=True)


def _notes(plans: list[tuple[Planner, Plan]]) -> Iterator[str]:
    """What each plan says of itself, once; and what would fit where this does not."""
    from ..planning.run import refusal

    said: set[str] = set()
    for one, plan in plans:
        for note in plan.notes:
            if note not in said:
                said.add(note)
                yield f"note: {note}" if one is plans[0][0] else f"note: {plan.card}: {note}"
        if not plan.fits:
            yield f"note: {plan.card}: does not fit; {refusal(plan, one).fix}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2g}"
