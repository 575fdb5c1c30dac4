"""``qcore presets``: lists the presets of core and plugins, and prints the settings of one."""

from __future__ import annotations

from typing import Any

import click

from .common import debug_option, emit, json_option


@click.group("presets")
def command() -> None:
    """Named settings, from core and from plugins."""


@command.command("list")
@json_option
@debug_option
def list_presets(as_json: bool) -> None:
    """List the presets and where each comes from."""
    from ..config.presets import load_presets

    presets = load_presets()
    rows: list[dict[str, Any]] = [
        {
            "id": preset.id,
            "aliases": list(preset.aliases),
            "origin": preset.origin,
            "base_model": preset.base_model,
            "description": preset.description,
        }
        for preset in presets
    ]
    broken = [{"file": str(one.file), "reason": str(one.reason)} for one in presets.broken]
    bases = presets.default_base_models()
    if as_json:
        emit({"presets": rows, "default_base_models": bases, "broken": broken})
        return
    from .terminal import show

    show("", [{**row, "aliases": ", ".join(row["aliases"] or ())} for row in rows])
    for generation, model in bases.items():
        click.echo(f"default base of generation {generation}: {model}")
    for one in broken:
        click.echo(f"broken: {one['file']}: {one['reason']}", err=True)


@command.command("show")
@click.argument("name")
@json_option
@debug_option
def show_preset(name: str, as_json: bool) -> None:
    """Print the settings of preset NAME, as --config would take them."""
    from ..config.presets import load_presets
    from ..config.spec import line_of, plain

    preset = load_presets().get(name)
    if as_json:
        emit(
            {
                "id": preset.id,
                "aliases": list(preset.aliases),
                "origin": preset.origin,
                "base_model": preset.base_model,
                "description": preset.description,
                "settings": {key: plain(value) for key, value in preset.settings.items()},
            }
        )
        return
    click.echo(f"# {preset.id} ({preset.origin}): {preset.description}")
    if preset.base_model:
        click.echo(f"# model: {preset.base_model}")
    for key, value in preset.settings.items():
        click.echo(line_of(key, value))
