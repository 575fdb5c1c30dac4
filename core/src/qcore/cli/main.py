"""The ``qcore`` command: lists verbs without importing them, turns errors into exit statuses.

This file decides exit statuses and that ``--help`` imports no verb: commands are listed from
a table, and those of plugins from entry-point metadata. Each verb has a file of its own,
which imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

import click

from ..errors import InputError, QcoreError, Stopped
from ..io.entry_points import check_disabled
from ..io.stop_signals import ignore
from ..io.version import __version__
from .common import check_repeats, check_text, debugging, fail, wants_json
from .output import OutputError, exit_status
from .plugin_command import PluginCommand, find, listed

#: name -> (module, help); the order is that of ``--help``.
VERBS = {
    "inspect": ("inspect", "What a model is, by which evidence, and whether it is whole."),
    "plan": ("plan", "Will it fit: memory by term, micro-batch, recompute, time."),
    "data": ("data", "See rows as a run trains them: findings, tokens, conversion."),
    "train": ("train", "Fine-tune a model with QLoRA and write a PEFT adapter."),
    "merge": ("merge", "Write base + adapter as a drop-in checkpoint."),
    "adapter": ("adapter", "See what an adapter holds."),
    "generate": ("generate", "Answer a prompt, with or without an adapter."),
    "verify": ("verify", "Check that a folder holds what its manifest says."),
    "plugins": ("plugins", "What is installed, and what is broken and why."),
    "presets": ("presets", "Named settings, from core and from plugins."),
    "skus": ("skus", "What is known of published models, and how well."),
    "doctor": ("doctor", "Check the environment."),
    "demo": ("demo", "Train, merge and verify a tiny checkpoint, start to end."),
}


class Verbs(click.Group):
    """A group whose commands are imported when they are run."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click does, which takes any broken pipe for that of the output."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _unusable(error) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Core's verbs in their order, then plugins' by name."""
        return [*VERBS, *listed(VERBS)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name in VERBS:
            module = import_module(f".{VERBS[cmd_name][0]}", __package__)
            command: click.Command = module.command
            return command
        return find(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion where there is no such command; no option twice."""
        if self.get_command(ctx, args[0]) is None:
            import difflib

            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"No such command '{args[0]}'.{hint}", ctx)
        name, command, rest = super().resolve_command(ctx, args)
        # `plugins` and `doctor` say themselves what is wrong with the plugins.
        if not ctx.resilient_parsing and name not in ("plugins", "doctor"):
            check_disabled()
        if not (command is None or isinstance(command, PluginCommand) or ctx.resilient_parsing):
            check_repeats(command, name, rest, ctx)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        rows = [(name, text) for name, (_, text) in VERBS.items()]
        for name, entry in listed(VERBS).items():
            rows.append((name, f"from plugin {entry.identity.distribution}"))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qcore")
def cli() -> None:
    """Fine-tune and merge models through plugins. Every step proves its effect."""


def main() -> NoReturn:
    """Run the command line and exit; what ``qcore`` and ``python -m qcore`` call."""
    arguments = sys.argv[1:]
    if not debugging(arguments) or "RANK" in os.environ:
        sys.excepthook = _internal
    status = exit_status(partial(_run, arguments))
    ignore()  # while the interpreter shuts down, which takes a second with torch
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    """The exit status of a verb.

    Raises:
        OutputError: standard output cannot be written.
    """
    try:
        check_text(arguments)
        # Without standalone mode click returns the status of an Exit instead of raising it.
        status = cli.main(arguments, prog_name="qcore", standalone_mode=False)
    except QcoreError as error:
        if debugging(arguments):
            import traceback

            traceback.print_exc()
        return _failed(error, arguments)
    except click.ClickException as error:
        return _usage(error, arguments)
    except (click.Abort, KeyboardInterrupt):
        stopped = Stopped("QC-CLI-005", "interrupted", fix="run the command again")
        return _failed(stopped, arguments)
    except OutputError:
        raise
    except OSError as error:
        return _failed(_unusable(error), arguments)
    return status if isinstance(status, int) else 0


def _failed(error: QcoreError, arguments: list[str]) -> int:
    """Print an error, on standard error if standard output does not take its JSON.

    One of several ranks hands its error over: they print one for all of them.
    """
    if "RANK" in os.environ:
        from ..parallel import handover, rank

        if rank.seat() is not None:
            import traceback

            trace = "".join(traceback.format_exception(error))
            shown = handover.hand_over(handover.of_error(error, trace))
            if shown is None:
                return error.exit_code
            error = shown
    try:
        return fail(error, as_json=wants_json(arguments))
    except OutputError:
        return fail(error, as_json=False)


def _unusable(error: OSError) -> QcoreError:
    """What the system says of a path that no check foresaw, e.g. a name that is too long."""
    return InputError(
        "QC-CLI-006",
        "cannot be used",
        file=str(error.filename)[:200] if error.filename else None,
        found=error.strerror or str(error),
        fix="name another path",
    )


def _usage(error: click.ClickException, arguments: list[str]) -> int:
    """Print what click refuses; of a group without a command, its help."""
    from ..errors import UsageError

    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return UsageError.exit_code
    context = getattr(error, "ctx", None)
    fix = f"see {context.command_path} --help" if context else "see qcore --help"
    what = error.format_message()
    if isinstance(error, click.NoSuchOption) and context is not None:
        key = _setting(error.option_name, context.command, near=not error.possibilities)
        if key is not None:
            what, fix = error.message, f"write --set {key}=VALUE"
    wrong = UsageError("QC-CLI-001", what.rstrip("."), fix=fix)
    return _failed(wrong, arguments)


def _setting(option: str, command: click.Command, *, near: bool) -> str | None:
    """The setting that an unknown option means, for a command that takes ``--set``."""
    if not any("--set" in parameter.opts for parameter in command.params):
        return None
    from ..config.settings import meant

    return meant(option.lstrip("-").replace("-", "_"), near=near)


def _internal(kind: type[BaseException], value: BaseException, trace: object) -> None:
    """A defect of qcore itself, as one error; ``--debug`` shows the traceback."""
    if issubclass(kind, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return
    if debugging(sys.argv[1:]):
        sys.__excepthook__(kind, value, value.__traceback__)
    text = f"{kind.__name__}: {value}"
    defect = QcoreError("QC-INTERNAL-001", text, fix="run with --debug and report it")
    defect.__cause__ = value
    _failed(defect, sys.argv[1:])
