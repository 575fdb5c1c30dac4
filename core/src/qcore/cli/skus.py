"""``qcore skus``: lists records of published models (SKUs), and prints the facts of one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .common import count, debug_option, emit, json_option

if TYPE_CHECKING:
    from ..skus.records import Served, Sku


@click.group("skus")
def command() -> None:
    """What is known of published models, and how well."""


@command.command("list")
@json_option
@debug_option
def list_skus(as_json: bool) -> None:
    """List the models that have a record, open and hosted."""
    from ..skus.registry import load_skus

    skus = load_skus()
    rows = [_row(sku) for sku in skus]
    broken = [
        {"origin": one.origin, "file": str(one.file) if one.file else None, "reason": one.reason}
        for one in skus.broken
    ]
    twice = {name: list(origins) for name, origins in skus.claimed_twice.items()}
    if as_json:
        emit({"skus": rows, "broken": broken, "claimed_twice": twice})
        return
    from .terminal import show

    if rows:
        show("", [_for_people(row) for row in rows])
    else:
        click.echo("no record is installed; plugins bring them")
    for one in broken:
        where = f": {one['file']}" if one["file"] else ""
        click.echo(f"broken: {one['origin']}{where}: {one['reason']}", err=True)
    for name, origins in twice.items():
        click.echo(f"brought twice: {name}, by {' and '.join(origins)}", err=True)


def _row(sku: Sku) -> dict[str, Any]:
    return {
        "id": sku.id,
        "generation": sku.generation,
        "parameters": sku.value("parameters"),
        "context": sku.value("context_native"),
        "context_extended": sku.value("context_extended"),
        "licence": sku.value("licence"),
        "weights": "hosted" if sku.hosted else "open",
        "release_date": sku.value("release_date"),
        "origin": sku.origin,
    }


def _for_people(row: Mapping[str, Any]) -> dict[str, Any]:
    parameters = row["parameters"]
    return {
        "id": row["id"],
        "generation": row["generation"],
        "parameters": count(parameters) if parameters else "",
        "context": row["context"],
        "licence": row["licence"],
        "weights": row["weights"],
        "released": row["release_date"],
    }


@command.command("show")
@click.argument("ident", metavar="ID")
@json_option
@debug_option
def show_sku(ident: str, as_json: bool) -> None:
    """Print every value that is known of ID, with its mark and its source."""
    from ..skus.registry import load_skus

    sku = load_skus().get(ident)
    if as_json:
        emit(
            {
                **_row(sku),
                "architecture": sku.architecture,
                "aliases": list(sku.aliases),
                "instead": list(sku.instead),
                "facts": {
                    section: {key: asdict(fact) for key, fact in facts.items()}
                    for section, facts in sku.facts.items()
                    if facts
                },
                "served": [asdict(one) for one in sku.served],
            }
        )
        return
    _print(sku)


def _print(sku: Sku) -> None:
    """Values in the order of the sections; sources as numbers, listed below."""
    from ..skus.compare import format_value

    kind = "served by API only" if sku.hosted else f"architecture {sku.architecture}"
    click.echo(f"{sku.id}: generation {sku.generation}, {kind} (from {sku.origin})")
    sources: dict[str, int] = {}
    rows = []
    for section, facts in sku.facts.items():
        for key, fact in facts.items():
            number = sources.setdefault(fact.source, len(sources) + 1)
            name = key if section in ("values", "shape") else f"{section}.{key}"
            rows.append((name, format_value(fact.value), fact.mark.value, number))
    width = max(len(row[0]) for row in rows)
    for name, value, mark, number in rows:
        click.echo(f"  {name:<{width}}  {value}  ({mark} [{number}])")
    for one in sku.served:
        number = sources.setdefault(one.source, len(sources) + 1)
        click.echo(f"  served by {one.provider} as {one.id}  ({one.mark.value} [{number}])")
        click.echo(f"    {_offer(one)}")
    if sku.instead:
        click.echo(f"  open models instead: {', '.join(sku.instead)}")
    for source, number in sources.items():
        click.echo(f"[{number}] {source}")


def _offer(one: Served) -> str:
    prices = ", ".join(f"{kind} {price:g}" for kind, price in one.prices.items())
    window = f"context {one.context:,}, output {one.output:,}" if one.context else ""
    offer = [window, f"US dollars per million tokens: {prices}", one.note or ""]
    return "; ".join(part for part in offer if part)
