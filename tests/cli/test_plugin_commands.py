"""Commands of plugins: their options are click's, and their faults carry their name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support.cli_kit import Ended, apart
from support.tiers import fast

from qcore.testing import write_distribution

COMMAND = """
import click, os, socket, sys
from qcore.errors import InputError

@click.command("publish")
@click.option("--tag", "-t", multiple=True)
@click.option("--name", "-n", default="")
@click.option("--pair", nargs=2)
@click.option("-v", "--verbose", count=True)
@click.argument("rest", nargs=-1)
def command(tag, name, pair, verbose, rest):
    {body}

@click.group("store")
def store():
    pass

store.add_command(command, "put")
"""


def installed(folder: Path, body: str = "pass", *, source: str = COMMAND) -> Path:
    """A folder with the distribution ``acme-tools 1.0``, which brings two commands."""
    points = "[qcore.commands]\nacme-publish = acme_tools\nacme-store = acme_tools:store\n"
    write_distribution(
        folder,
        "acme-tools",
        module="acme_tools",
        source=source.replace("{body}", body),
        entry_points=points,
    )
    return folder


def run(folder: Path, *arguments: str) -> Ended:
    return apart(*arguments, env={"PYTHONPATH": str(folder)})


SHOW = "click.echo(repr((tag, name, pair, verbose, rest)))"


# -- options


@pytest.mark.parametrize("command", [("acme-publish",), ("acme-store", "put")])
def test_an_option_that_is_declared_multiple_may_be_repeated(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    ended = run(installed(tmp_path, SHOW), *command, "--tag", "a", "--tag=b", "-t", "c")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "(('a', 'b', 'c'), '', None, 0, ())\n"


def test_a_counted_option_may_be_repeated(tmp_path: Path) -> None:
    ended = run(installed(tmp_path, SHOW), "acme-publish", "--verbose", "--verbose", "-vv")
    assert (ended.code, ended.out) == (0, "((), '', None, 4, ())\n")


@pytest.mark.parametrize("command", [("acme-publish",), ("acme-store", "put")])
@pytest.mark.parametrize("twice", [("--name", "a", "--name=b"), ("-n", "a", "--name", "a")])
def test_any_other_option_is_given_once(
    tmp_path: Path, command: tuple[str, ...], twice: tuple[str, ...]
) -> None:
    ended = run(installed(tmp_path, SHOW), *command, *twice)
    assert ended.code == 2
    assert "--name: is given twice. Fix: give it once" in ended.error("QC-CLI-004")


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (("--name", "a", "--", "--name", "b"), "((), 'a', None, 0, ('--name', 'b'))"),
        (("--name", "a", "--", "--name", "--name"), "((), 'a', None, 0, ('--name', '--name'))"),
        (("--tag", "--name", "--name", "a"), "(('--name',), 'a', None, 0, ())"),
        (("--name", "--name"), "((), '--name', None, 0, ())"),
        (("--pair", "--name", "--name"), "((), '', ('--name', '--name'), 0, ())"),
    ],
)
def test_what_only_looks_like_an_option_is_not_counted(
    tmp_path: Path, arguments: tuple[str, ...], seen: str
) -> None:
    ended = run(installed(tmp_path, SHOW), "acme-publish", *arguments)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"{seen}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "m", "--prompt", "--prompt"),
        ("generate", "--prompt", "p", "--", "--prompt"),
    ],
)
def test_the_same_of_core_verbs(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ended = apart(*arguments, cwd=tmp_path)
    assert ended.code == 65, ended.err  # no model of that name
    assert "QC-CLI-004" not in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "m", "--prompt", "p", "--json", "--json"),
        ("plan", "m", "--r", "1", "--r=2"),
        ("presets", "show", "quick", "--json", "--json"),
    ],
)
def test_a_repeat_of_core_is_refused(arguments: tuple[str, ...]) -> None:
    ended = apart(*arguments)
    assert ended.code == 2
    assert "QC-CLI-004" in ended.err + ended.out


def test_core_options_that_are_declared_multiple_may_be_repeated() -> None:
    for arguments in (
        ("train", "--data", "a", "--output", "b", "--kernels", "a=b", "--kernels", "a=b"),
        ("plan", "m", "--gpu", "a", "--gpu", "b", "--set", "r=1", "--set", "r=2"),
        ("generate", "m", "--prompt", "p", "--chat-template-kwargs", "a=1",
         "--chat-template-kwargs", "a=2", "--image", "a", "--image", "b"),
    ):  # fmt: skip
        assert "QC-CLI-004" not in apart(*arguments).err


# -- faults

FAULTS = {
    "an error": ("raise KeyError('weight')", "KeyError: 'weight' (acme_tools.py:"),
    "a base exception": (
        "raise type('Odd', (BaseException,), {})('no')",
        "Odd: no (acme_tools.py:",
    ),
    "an exit": ("sys.exit(3)", "SystemExit: 3 (acme_tools.py:"),
    "an exit with a text": ("sys.exit('no disk')", "SystemExit: no disk (acme_tools.py:"),
    "a missing file": ("open('no-such-file')", "FileNotFoundError: "),
    "a pipe of its own": (
        "a, b = socket.socketpair(); b.close(); a.send(b'x')",
        "BrokenPipeError: [Errno 32] Broken pipe (acme_tools.py:",
    ),
}


@pytest.mark.parametrize("command", [("acme-publish",), ("acme-store", "put")])
@pytest.mark.parametrize("fault", fast(FAULTS, *[*FAULTS][::3]))
def test_a_fault_while_it_runs_names_it(
    tmp_path: Path, command: tuple[str, ...], fault: str
) -> None:
    body, cause = FAULTS[fault]
    ended = run(installed(tmp_path, body), *command)
    assert ended.code == 69, ended.err
    line = ended.error("QC-PLUGIN-021")
    assert f"command '{command[0]}' (acme-tools 1.0) failed: found {cause}" in line
    assert "update or uninstall acme-tools" in line


@pytest.mark.parametrize("cause", [cause for cause, _ in FAULTS.values()])
def test_a_fault_of_its_import_names_it(tmp_path: Path, cause: str) -> None:
    folder = installed(tmp_path, source=f"import socket, sys\n{cause}\n")
    ended = run(folder, "acme-publish", "--help")
    assert ended.code == 69, ended.err
    line = ended.error("QC-PLUGIN-020")
    assert "command 'acme-publish' (acme-tools 1.0) cannot be imported: found " in line
    assert "update or uninstall acme-tools" in line


def test_an_exit_at_import_is_a_fault_whatever_its_status(tmp_path: Path) -> None:
    ended = run(installed(tmp_path, source="raise SystemExit\n"), "acme-publish")
    assert ended.code == 69
    assert "(acme-tools 1.0) cannot be imported" in ended.error("QC-PLUGIN-020")


@pytest.mark.parametrize("source", ["command = store = 7\n", "other = 7\n"])
def test_what_is_no_command_names_it(tmp_path: Path, source: str) -> None:
    ended = run(installed(tmp_path, source=source), "acme-store")
    assert ended.code == 69
    assert "command 'acme-store' (acme-tools 1.0)" in ended.error("QC-PLUGIN-020")


def test_a_fault_in_its_options_names_it(tmp_path: Path) -> None:
    source = """
import click

class Odd(click.Command):
    def get_params(self, ctx):
        raise ZeroDivisionError("parameters")

def check(ctx, param, value):
    raise ZeroDivisionError("a callback")

command = Odd("publish")
store = click.Command("store", params=[click.Option(["--x"], callback=check)])
"""
    for name, cause in (("acme-publish", "parameters"), ("acme-store", "a callback")):
        ended = run(installed(tmp_path / name, source=source), name)
        assert ended.code == 69
        assert f"'{name}' (acme-tools 1.0) failed" in ended.error("QC-PLUGIN-021")
        assert f"ZeroDivisionError: {cause}" in ended.err


def test_json_and_debug_hold_for_them(tmp_path: Path) -> None:
    source = COMMAND.replace("@click.argument", "@click.option('--json', is_flag=True)\n"
                             "@click.option('--debug', is_flag=True)\n@click.argument")  # fmt: skip
    source = source.replace("verbose, rest", "verbose, rest, json, debug")
    folder = installed(tmp_path, "raise KeyError(name)", source=source)
    ended = run(folder, "acme-publish", "--json")
    assert (ended.code, ended.err) == (69, "")
    assert ended.json["error"]["code"] == "QC-PLUGIN-021"
    assert "Traceback" in run(folder, "acme-publish", "--debug").err


PASSING = {
    "an error of qcore": ("raise InputError('QC-ACME-001', 'is wrong')", 65, "error[QC-ACME-001]"),
    "a usage error": ("raise click.UsageError('not so')", 2, "error[QC-CLI-001] not so"),
    "a click exit": ("raise click.exceptions.Exit(5)", 5, ""),
    "a click abort": ("raise click.Abort", 130, "error[QC-CLI-005]"),
    "an interrupt": ("raise KeyboardInterrupt", 130, "error[QC-CLI-005]"),
    "an exit without a status": ("sys.exit()", 0, ""),
    "an exit with status 0": ("sys.exit(0)", 0, ""),
}


@pytest.mark.parametrize("what", PASSING)
def test_what_click_and_qcore_understand_passes(tmp_path: Path, what: str) -> None:
    body, status, text = PASSING[what]
    ended = run(installed(tmp_path, body), "acme-publish")
    assert ended.code == status
    assert ended.err.lstrip().startswith(text)
    assert "PLUGIN" not in ended.err


def test_its_output_is_on_stdout_and_a_reader_may_leave(tmp_path: Path) -> None:
    folder = installed(tmp_path, "[print('x' * 99) for _ in range(9999)]")
    shell = f"{sys.executable} -m qcore acme-publish | head -1; exit ${{PIPESTATUS[0]}}"
    ended = apart("-c", shell, command=("/bin/bash",), env={"PYTHONPATH": str(folder)})
    assert (ended.code, ended.err, ended.out) == (141, "", "x" * 99 + "\n")
    shell = f"{sys.executable} -m qcore acme-publish > /dev/full"
    ended = apart("-c", shell, command=("/bin/bash",), env={"PYTHONPATH": str(folder)})
    assert ended.code == 73
    assert "QC-CLI-007" in ended.err


def test_its_help_is_its_own(tmp_path: Path) -> None:
    folder = installed(tmp_path)
    ended = run(folder, "acme-publish", "--help")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("Usage: qcore acme-publish [OPTIONS] [REST]...")
    ended = run(folder, "acme-store", "put", "--help")
    assert ended.out.startswith("Usage: qcore acme-store put [OPTIONS] [REST]...")
    assert "acme-publish  from plugin acme-tools" in run(folder, "--help").out


def test_a_shell_completes_its_options(tmp_path: Path) -> None:
    environment = {
        "PYTHONPATH": str(installed(tmp_path)),
        "_QCORE_COMPLETE": "bash_complete",
        "COMP_WORDS": "qcore acme-publish --na",
        "COMP_CWORD": "2",
    }
    assert "--name" in apart(env=environment).out
