"""``qcore train``: merges settings from flags, file and preset, and picks the default model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..io.stop_signals import importing
from .common import debug_option, emit, json_option, spoken

if TYPE_CHECKING:
    from ..config.presets import Presets
    from ..training.report import TrainReport


@click.command("train")
@click.option(
    "--model", help="Folder or hub id; by default the preset's, else the default of --generation."
)
@click.option(
    "--data",
    required=True,
    multiple=True,
    metavar="DATA",
    help="Rows to train on: a file, folder or hub id; repeatable.",
)
@click.option(
    "--eval-data", multiple=True, metavar="DATA", help="Rows to evaluate on alone; repeatable."
)
@click.option("--format", "data_format", help="Row format; by default found by its keys.")
@click.option(
    "--media-root", type=click.Path(path_type=Path), help="Folder with absolute media paths."
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Adapter folder.")
@click.option("--preset", help="Named settings; see qcore presets list.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="run.yaml")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable.")
@click.option(
    "--kernels", multiple=True, metavar="OP=BACKEND", help="Backend of one op; repeatable."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--resume", is_flag=True, help="Continue the run that was stopped.")
@click.option("--adapter-class", help="Class that the adapter is written for: text or vl.")
@click.option("--generation", help="Take an unproven checkpoint for this generation.")
@json_option
@debug_option
def command(
    model: str | None,
    data: tuple[str, ...],
    eval_data: tuple[str, ...],
    data_format: str | None,
    media_root: Path | None,
    output: Path,
    preset: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
    kernels: tuple[str, ...],
    device: str,
    resume: bool,
    adapter_class: str | None,
    generation: str | None,
    as_json: bool,
) -> None:
    """Fine-tune MODEL on DATA with QLoRA and publish a PEFT adapter in OUTPUT."""
    from ..config.presets import load_presets
    from ..config.resolve import load_settings, parse_entries
    from .terminal import terminal_reporter

    presets = load_presets()
    backends = parse_entries("kernels", kernels, flag="--kernels")
    flags: dict[str, tuple[str, str | int | None]] = {
        "--adapter-class": ("adapter_class", adapter_class or None),
        "--generation": ("generation", generation or None),
    }
    settings, origins = load_settings(
        preset=preset,
        config_file=config_file,
        sets=[
            *sets,
            *(f"kernels.{op}={backend}" for op, backend in backends.items()),
        ],
        flags=flags,
        presets=presets,
    )
    reporter = terminal_reporter(quiet=as_json)
    if model is None:
        model, origin = _default_model(presets, preset, settings.generation)
        reporter.note(f"model = {model} (from {origin})")
    for key, origin in origins.items():
        if origin != "default":
            reporter.note(f"{key} = {getattr(settings, key)} (from {origin})")

    with importing():
        from ..training.train import train

    with spoken(flags):
        report = train(
            model, data, output, settings,
            eval_data=eval_data, data_format=data_format or "", media_root=media_root,
            device=device, resume=resume, reporter=reporter,
        )  # fmt: skip
    if as_json:
        emit(report.as_json())
        return
    click.echo(_summary(report))


def _summary(report: TrainReport) -> str:
    held_out = f", eval {report.eval_loss:.4f}" if report.eval_loss is not None else ""
    return (
        f"{report.output}: {report.steps} steps, loss {report.first_loss:.4f} -> "
        f"{report.last_loss:.4f}{held_out}; adapter for class '{report.adapter_class}'"
    )


def _default_model(presets: Presets, preset: str | None, generation: str) -> tuple[str, str]:
    """The model where --model is missing, and what names it.

    Raises:
        UsageError: ``QC-CLI-002`` nothing names one; ``QC-PRESET-001``.
        PluginError: ``QC-PRESET-002``, ``-003`` or ``-005``.
    """
    from ..errors import UsageError

    if preset is not None and (model := presets.get(preset).base_model) is not None:
        return model, f"preset {presets.get(preset).id}"
    if generation and (model := presets.default_base_model(generation)) is not None:
        return model, f"the default base of generation {generation}"
    bases = presets.default_base_models()
    flags = [f"--generation {name} for {model}" for name, model in sorted(bases.items())]
    raise UsageError(
        "QC-CLI-002",
        "no model was named",
        field="--model",
        expected="a folder or a hub id",
        fix=", ".join(
            ["pass --model", "or a --preset that names one", *(f"or {f}" for f in flags)]
        ),
    )
