"""The command line: the group, and how an error ends a process.

This file decides exit statuses and that ``--help`` imports no verb: commands are listed from
a table, and those of plugins from entry-point metadata. Each verb has a file of its own,
which imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import InputError, PluginError, QcoreError, Stopped, WriteError
from .common import check_repeats, check_text, debugging, fail, wants_json

#: name -> (module, help); the order is that of ``--help``.
VERBS = {
    "inspect": ("inspect", "What a model is, by which evidence, and whether it is whole."),
    "plan": ("plan", "Will it fit: memory by term, micro-batch, recompute, time."),
    "train": ("train", "Fine-tune a model with QLoRA and write a PEFT adapter."),
    "merge": ("merge", "Write base + adapter as a drop-in checkpoint."),
    "generate": ("generate", "Answer a prompt, with or without an adapter."),
    "verify": ("verify", "Check that a folder holds what its manifest says."),
    "plugins": ("plugins", "What is installed, and what is broken and why."),
    "presets": ("presets", "Named settings, from core and from plugins."),
    "skus": ("skus", "What is known of published models, and how well."),
    "doctor": ("doctor", "Check the environment."),
    "demo": ("demo", "Train, merge and verify a tiny checkpoint, start to end."),
}
COMMANDS = "qcore.commands"  #: entry points of plugins: command name -> click command


class _Left(Exception):
    """Whoever reads the output left; click would make it a status of 1."""


class _Foreign(Exception):
    """A pipe or socket broke that is not the output; click would take it for that."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _past_click() -> Iterator[None]:
    """Hand a broken pipe on as what click does not know."""
    try:
        yield
    except BrokenPipeError as error:
        raise (_Left() if reader_left() else _Foreign(error)) from error
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich's way to end
            raise _Left from end
        raise


class Verbs(click.Group):
    """A group whose commands are imported when they are run."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """As click does; here ``--help`` and ``--version`` print."""
        with _past_click():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """As click does."""
        with _past_click():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Core's verbs in their order, then plugins' by name."""
        return [*VERBS, *sorted(_plugin_commands())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name in VERBS:
            module = import_module(f".{VERBS[cmd_name][0]}", __package__)
            command: click.Command = module.command
            return command
        if cmd_name in (found := _plugin_commands()):
            return _load(cmd_name, found[cmd_name])
        return None

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
        if command is not None and not ctx.resilient_parsing:
            check_repeats(command, name, rest, ctx)
        return name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        rows = [(name, text) for name, (_, text) in VERBS.items()]
        rows += [(name, f"from plugin {owner}") for name, owner in _owners().items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def _plugin_commands() -> dict[str, str]:
    from importlib.metadata import entry_points

    found = entry_points(group=COMMANDS)
    return {point.name: point.value for point in found if point.name not in VERBS}


def _owners() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {
        point.name: point.dist.name if point.dist else point.value
        for point in sorted(entry_points(group=COMMANDS), key=lambda point: point.name)
        if point.name not in VERBS
    }


def _load(name: str, value: str) -> click.Command:
    module, _, attribute = value.partition(":")
    try:
        command = getattr(import_module(module), attribute or "command")
    except (ImportError, AttributeError, SyntaxError) as error:
        raise PluginError(
            "QC-PLUGIN-020", f"command '{name}' cannot be imported", field=value, found=error,
            fix=f"reinstall or uninstall {_owners().get(name, 'its distribution')}",
        ) from None  # fmt: skip
    if not isinstance(command, click.Command):
        raise PluginError(
            "QC-PLUGIN-020",
            f"command '{name}' is not a click command",
            field=value,
            found=type(command).__name__,
            expected="click.Command",
            fix=f"uninstall {_owners().get(name, 'its distribution')}",
        )
    return command


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qcore")
def cli() -> None:
    """Fine-tune and merge models through plugins. Every step proves its effect."""


#: The status that shells give to a process that its reader left: 128 + SIGPIPE.
_LEFT = 141


def main() -> NoReturn:
    """Run the command line and exit; what ``qcore`` and ``python -m qcore`` call."""
    arguments = sys.argv[1:]
    if not debugging(arguments):
        sys.excepthook = _internal
    try:
        status = _run(arguments)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before we began
                stream.flush()
    except _Left:
        status = _unheard(None)
    except BrokenPipeError:
        if not reader_left():
            raise
        status = _unheard(None)
    except OSError as error:
        if not _of_output(error):
            raise
        status = _unheard(error)
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    """The exit status of a verb; only what cannot be written escapes."""
    try:
        check_text(arguments)
        # Without standalone mode click returns the status of an Exit instead of raising it.
        status = cli.main(arguments, prog_name="qcore", standalone_mode=False)
    except QcoreError as error:
        if debugging(arguments):
            import traceback

            traceback.print_exc()
        return fail(error, as_json=wants_json(arguments))
    except click.ClickException as error:
        return _usage(error, arguments)
    except (click.Abort, KeyboardInterrupt):
        stopped = Stopped("QC-CLI-005", "interrupted", fix="run the command again")
        return fail(stopped, as_json=wants_json(arguments))
    except _Foreign as broken:
        return fail(_unreadable(broken.error), as_json=wants_json(arguments))
    except OSError as error:
        if _of_output(error):
            raise
        return fail(_unreadable(error), as_json=wants_json(arguments))
    return status if isinstance(status, int) else 0


def reader_left() -> bool:
    """Whether nobody reads stdout or stderr any more."""
    asked = select.poll()
    for number in (1, 2):
        asked.register(number, 0)  # what is wrong with it is told unasked
    return any(event & select.POLLERR for _, event in asked.poll(0))


def _of_output(error: OSError) -> bool:
    """Whether it is of stdout or stderr: a line feed cannot be written to them either."""
    if error.filename is not None:
        return False
    if error.errno == errno.EPIPE:
        return reader_left()
    for number in (1, 2):
        try:
            os.write(number, b"\n")
        except OSError as again:
            if again.errno == error.errno:
                return True
    return False


def _unheard(error: OSError | None) -> int:
    """The status where nobody reads on, which is no fault, or where the output is full."""
    with suppress(OSError):
        if error is not None:
            full = WriteError(
                "QC-CLI-007",
                "cannot be written",
                field="standard output",
                found=error.strerror,
                fix="make room, or redirect it elsewhere",
            )
            fail(full, as_json=False)
    # What is still in the buffers must not be flushed again when the interpreter ends.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(nowhere, stream.fileno())
    return _LEFT if error is None else WriteError.exit_code


def _unreadable(error: OSError) -> QcoreError:
    """What the system says of a path that no check foresaw, e.g. a name that is too long."""
    return InputError(
        "QC-CLI-006",
        "cannot be used",
        file=str(error.filename)[:200] if error.filename else None,
        found=error.strerror or str(error),
        fix="name another path",
    )


def _usage(error: click.ClickException, arguments: list[str]) -> int:
    from ..errors import UsageError

    context = getattr(error, "ctx", None)
    fix = f"see {context.command_path} --help" if context else "see qcore --help"
    wrong = UsageError("QC-CLI-001", error.format_message().rstrip("."), fix=fix)
    return fail(wrong, as_json=wants_json(arguments))


def _internal(kind: type[BaseException], value: BaseException, trace: object) -> None:
    """A defect of qcore itself, as one error; ``--debug`` shows the traceback."""
    if issubclass(kind, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return
    text = f"{kind.__name__}: {value}"
    defect = QcoreError("QC-INTERNAL-001", text, fix="run with --debug and report it")
    fail(defect, as_json=wants_json(sys.argv[1:]))
