"""``qcore adapter diff``: prints which fields, tensors and deltas of two adapters differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..io.stop_signals import importing
from .common import debug_option, emit, json_option

if TYPE_CHECKING:
    from ..adapter.compare import AdapterComparison

_SHOWN = 20  # rows of a table


@click.command("diff")
@click.argument("a")
@click.argument("b")
@json_option
@debug_option
def diff(a: str, b: str, as_json: bool) -> None:
    """Compare the adapters A and B: config fields, tensors, and the deltas that they make."""
    with importing():
        from ..adapter.compare import compare_adapters

    comparison = compare_adapters(a, b)
    if as_json:
        emit(comparison.as_json())
        return
    _print(comparison)


def _print(comparison: AdapterComparison) -> None:
    facts = comparison.as_json()
    relative = facts["relative_difference"]
    by = f", deltas differ by {relative:.2g} of their norm" if relative is not None else ""
    click.echo(f"{comparison.verdict}{by}")
    _table("fields", [{"field": f["field"], "a": _value(f["a"]), "b": _value(f["b"]),
                       "acts": f["acts"]} for f in facts["fields"]])  # fmt: skip
    _table("tensors", [{**t, "largest": "" if t["largest"] is None else f"{t['largest']:.2g}"}
                       for t in facts["differing"]])  # fmt: skip
    _table(
        "deltas",
        [
            {key: "not known" if d[key] is None else f"{d[key]:.4g}" if key != "module" else d[key]
             for key in ("module", "a", "b", "difference", "relative")}
            for d in facts["deltas"]
            if d["relative"] != 0
        ],
    )  # fmt: skip


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    from .terminal import show

    if rows:
        show(f"{title} that differ ({len(rows)})", rows[:_SHOWN])
    if len(rows) > _SHOWN:
        click.echo(f"  and {len(rows) - _SHOWN} more: see --json")


def _value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
