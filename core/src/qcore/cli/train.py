"""``qcore train``: merges settings from flags, file and preset, and picks the default model."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ..errors import UsageError
from .common import debug_option, emit, json_option, spoken
from .output import log

if TYPE_CHECKING:
    from ..config.presets import Presets
    from ..config.settings import Settings
    from ..reporting import Event
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
@click.option(
    "--verify-data", is_flag=True, help="Hash data files, also those that seem unchanged."
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Adapter folder.")
@click.option("--preset", help="Named settings; see qcore presets list.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="run.yaml")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable.")
@click.option(
    "--kernels", multiple=True, metavar="OP=BACKEND", help="Backend of one op; repeatable."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--gpus",
    type=int,
    metavar="N",
    help="GPUs of this machine that share the run; with --device cpu, processes.",
)
@click.option("--resume", is_flag=True, help="Continue the run that was stopped.")
@click.option(
    "--auto-resume", is_flag=True, help="Start the run, continue it, or report that it is finished."
)
@click.option(
    "--init-adapter",
    "--adapter",
    "init_adapter",
    help="Adapter to start from, a folder or a hub id; it sets rank, alpha and LoRA groups.",
)
@click.option("--trust-base", is_flag=True, help="Accept an adapter without a base fingerprint.")
@click.option(
    "--trust-generation",
    is_flag=True,
    help="With --trust-base: accept an adapter that names a base of another generation.",
)
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
    verify_data: bool,
    output: Path,
    preset: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
    kernels: tuple[str, ...],
    device: str,
    gpus: int | None,
    resume: bool,
    auto_resume: bool,
    init_adapter: str | None,
    trust_base: bool,
    trust_generation: bool,
    adapter_class: str | None,
    generation: str | None,
    as_json: bool,
) -> int | None:
    """Fine-tune MODEL on DATA with QLoRA and publish a PEFT adapter in OUTPUT."""
    from ..config.presets import load_presets
    from . import ranks
    from .terminal import terminal_reporter

    flags = _flags(adapter_class, generation)
    if ranks.launches(gpus):
        _settings(preset, config_file, sets, kernels, flags, load_presets())  # to refuse them here
        return ranks.launch(gpus or 0, device, restarts=auto_resume, as_json=as_json)
    # From here on: a scheduler's SIGUSR1 would end the process while torch is imported.
    with ranks.signals(as_json=as_json) as stop:
        presets = load_presets()
        settings, origins = _settings(preset, config_file, sets, kernels, flags, presets)
        reporter = terminal_reporter(quiet=as_json)
        if model is None:
            model, origin = _default_model(presets, preset, settings.generation)
            reporter.note(f"model = {model} (from {origin})")
        for key, origin in origins.items():
            if origin != "default":
                reporter.note(f"{key} = {getattr(settings, key)} (from {origin})")

        from ..training.train import train

        warnings = _Warnings()
        with spoken(flags), _finished_run(output), reporter.attached(warnings):
            report = train(
                model, data, output, settings,
                eval_data=eval_data, data_format=data_format or "", media_root=media_root,
                verify_data=verify_data, device=device, resume=resume, auto_resume=auto_resume,
                init_adapter=init_adapter, trust_base=trust_base,
                trust_generation=trust_generation, origins=origins, reporter=reporter, stop=stop,
            )  # fmt: skip
        if as_json and ranks.prints():
            emit({**report.as_json(), "warnings": warnings.texts})
        elif ranks.prints():
            log(_summary(report))
    return None


def _flags(
    adapter_class: str | None, generation: str | None
) -> dict[str, tuple[str, str | int | None]]:
    """Settings by the flags that set them."""
    return {
        "--adapter-class": ("adapter_class", adapter_class or None),
        "--generation": ("generation", generation or None),
    }


class _Warnings:
    """Collects the warnings of a run, which ``--json`` prints with the result."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def handle(self, event: Event, /) -> None:
        """Keep a warning; ignore the other events."""
        from ..reporting import WarningNote

        if isinstance(event, WarningNote):
            self.texts.append(event.text)


def _settings(
    preset: str | None,
    config_file: Path | None,
    sets: tuple[str, ...],
    kernels: tuple[str, ...],
    flags: Mapping[str, tuple[str, str | int | None]],
    presets: Presets,
) -> tuple[Settings, dict[str, str]]:
    """The settings and the source of each, with ``--kernels`` as entries of its setting."""
    from ..config.resolve import load_settings, parse_entries

    backends = parse_entries("kernels", kernels, flag="--kernels")
    return load_settings(
        preset=preset,
        config_file=config_file,
        sets=[*sets, *(f"kernels.{op}={backend}" for op, backend in backends.items())],
        flags=flags,
        presets=presets,
    )


def _summary(report: TrainReport) -> str:
    held_out = f", eval {report.eval_loss:.4f}" if report.eval_loss is not None else ""
    return (
        f"{report.output}: {report.steps} steps, loss {report.first_loss:.4f} -> "
        f"{report.last_loss:.4f}{held_out}{_best(report)}; "
        f"adapter for class '{report.adapter_class}'"
    )


def _best(report: TrainReport) -> str:
    """The best evaluation, where it is not that of the last step."""
    best = report.best_evaluation
    if best is None or best["step"] == report.steps:
        return ""
    published = ", which is published" if report.published_step == best["step"] else ""
    return f", lowest eval {best['eval_loss']:.4f} after step {best['step']}{published}"


@contextmanager
def _finished_run(output: Path) -> Iterator[None]:
    """Where ``--resume`` meets a finished run, the fix is the command that trains on from it."""
    try:
        yield
    except UsageError as error:
        if error.code != "QC-RESUME-005":
            raise
        from ..training.resume import free_name

        dropped = (
            "resume",
            "auto_resume",
            "output",
            "init_adapter",
            "trust_base",
            "trust_generation",
            "as_json",
        )
        more = ["--init-adapter", str(output), "--output", str(free_name(output))]
        command = shlex.join(["qcore", "train", *_typed(dropped), *more])
        fix = f"to train longer, start a new run from it, whose steps count from 0: {command}"
        raise error.replace(fix=fix) from None


def _typed(dropped: Collection[str]) -> Iterator[str]:
    """The options of the command line that is run, but for those in `dropped`."""
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        if context.get_parameter_source(name) is not ParameterSource.COMMANDLINE or name in dropped:
            continue
        flag, value = max(option.opts, key=len), context.params[name]
        if isinstance(option, click.Option) and option.is_flag:
            yield flag
            continue
        for word in value if option.multiple else (value,):
            yield from (flag, str(word))


def _default_model(presets: Presets, preset: str | None, generation: str) -> tuple[str, str]:
    """The model where --model is missing, and what names it.

    Raises:
        UsageError: ``QC-CLI-002`` nothing names one; ``QC-PRESET-001``.
        PluginError: ``QC-PRESET-002``, ``-003`` or ``-005``.
    """
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
