"""Commands of plugins: their options are click's, and their faults carry their name."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cli_kit import Ended, apart
from support.plugin_kit import distribution

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
    distribution(
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
