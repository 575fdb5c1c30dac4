"""What click lets pass, and what the system says: one line and the right status all the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run(*arguments: str | bytes) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qcore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (("inspect", "x" * 300), 65, "QC-CLI-006"),
        (("inspect", b"n\xffn"), 2, "QC-CLI-003"),
        (("presets", "show", "quick", "--json", "--json"), 2, "QC-CLI-004"),
        (("train", "--data", "a", "--output", "b", "--preset", "a", "--preset=b"), 2, "QC-CLI-004"),
        (("generate", "m", "--prompt", "p", "--temperature", "1e9"), 2, "QC-CLI-001"),
        (("generate", "m", "--prompt", "p", "--max-new-tokens", "9" * 20), 2, "QC-CLI-001"),
    ],
)
def test_one_line_and_the_status(
    arguments: tuple[str | bytes, ...], status: int, code: str
) -> None:
    done = run(*arguments)
    assert done.returncode == status
    text = done.stdout + done.stderr
    assert code in text
    assert "Traceback" not in text


_TRAIN = ("train", "--data", "a", "--output", "o")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("train", "--model", "m", "--data", "a", "--output", ""), "--output"),
        (("merge", "--model", "m", "--adapter", "a", "--output", ""), "--output"),
        (("merge", "--model", "", "--adapter", "a", "--output", "o"), "--model"),
        (("merge", "--model", "m", "--adapter", "", "--output", "o"), "--adapter"),
        (("demo", "--output", ""), "--output"),
        (("data", "convert", "a.jsonl", "--output", ""), "--output"),
        (("data", "show", "a.jsonl", "--model", "m", "--html", ""), "--html"),
        (("data", "check", "a.jsonl", "--model", ""), "--model"),
        (("data", "diff", "a.jsonl", "--model", "m", "--model", ""), "--model"),
        ((*_TRAIN, "--init-adapter", ""), "--init-adapter"),
        ((*_TRAIN, "--adapter="), "--init-adapter"),
        ((*_TRAIN, "--config", ""), "--config"),
        ((*_TRAIN, "--media-root", ""), "--media-root"),
        (("verify", ""), "FOLDER"),
        (("inspect", ""), "MODEL"),
        (("plan", ""), "MODEL"),
        (("generate", "", "--prompt", "p"), "MODEL"),
    ],
)
def test_an_empty_path_is_named(
    arguments: tuple[str, ...], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To `pathlib` an empty path is the current folder: the fix must not speak of that."""
    from click.testing import CliRunner

    from qcore.cli.main import cli
    from qcore.errors import UsageError

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, arguments)
    assert isinstance(done.exception, UsageError), done.output
    assert (done.exception.code, done.exception.field) == ("QC-CLI-010", field)
    assert not list(tmp_path.iterdir())


def test_a_prompt_may_be_empty() -> None:
    from qcore.cli.common import check_repeats
    from qcore.cli.generate import command

    check_repeats(command, "generate", ["m", "--prompt", "", "--system", ""], None)


def test_set_may_stand_more_than_once(tmp_path: Path) -> None:
    done = run("train", "--data", "a", "--output", str(tmp_path / "o"), "--set", "r=1",
               "--set", "seed=1")  # fmt: skip
    assert "QC-CLI-002" in done.stderr


@pytest.mark.parametrize("after", [0.15, 0.25, 0.35, 0.5])
def test_an_interrupt_is_never_swallowed(after: float, tmp_path: Path) -> None:
    """Also while torch is imported, whose import of numpy eats KeyboardInterrupt."""
    from qcore_qwen35.tiny import write

    write(tmp_path / "base")
    command = [sys.executable, "-m", "qcore", "generate", str(tmp_path / "base"),
               "--prompt", "hi", "--max-new-tokens", "100000", "--json"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    # Before Python's own start-up is over, the signal ends the process by itself.
    assert process.returncode in (130, -signal.SIGINT)
    if process.returncode == 130:
        assert json.loads(out)["error"]["code"] == "QC-CLI-005"


LONG = {
    "presets": "presets show quick",
    "json": "plugins list --json",
    "help": "train --help",
}


def piped(command: str) -> subprocess.CompletedProcess[str]:
    """A shell's line, with the status of qcore itself."""
    line = f"{sys.executable} -m qcore {command}"
    return subprocess.run(["/bin/bash", "-c", line], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", LONG)
def test_a_reader_that_leaves_early_is_no_defect(verb: str) -> None:
    """Nothing is said, and the status is that of any tool in a pipe."""
    done = piped(f"{LONG[verb]} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("", "")
    assert done.returncode == 141


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_after_a_line_of_much(unbuffered: str) -> None:
    code = (
        "import sys, click, qcore.cli.main as cli\n"
        "cli.cli.get_command = lambda ctx, name: click.Command(\n"
        "    name, callback=lambda: [click.echo('x' * 99) for _ in range(9999)])\n"
        "sys.argv = ['qcore', 'plan']\ncli.main()\n"
    )
    line = f'{sys.executable} -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["/bin/bash", "-c", line],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert (done.returncode, done.stderr, done.stdout) == (141, "", "x" * 99 + "\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("verb", LONG)
def test_an_output_that_is_full_is_one_line(verb: str) -> None:
    done = piped(f"{LONG[verb]} > /dev/full")
    assert done.returncode == 73
    (line,) = done.stderr.splitlines()
    assert line.startswith("error[QC-CLI-007] standard output: cannot be written: found No space")
    assert piped(f"{LONG[verb]} > /dev/full 2>&1").returncode == 73


@pytest.mark.parametrize("verb", LONG)
def test_an_output_that_is_closed_is_an_error(verb: str) -> None:
    done = piped(f"{LONG[verb]} >&-")
    assert done.returncode == 73
    (line,) = done.stderr.splitlines()
    assert line.startswith("error[QC-CLI-007] standard output: cannot be written: found Bad file")


@pytest.mark.parametrize("end", ["| true; exit ${PIPESTATUS[0]}", "> /dev/full", ">&-"])
def test_an_error_keeps_its_status(end: str) -> None:
    done = piped(f"presets show nonsense --json {end}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error[QC-PRESET-001] ")


def verb_that(raises: str) -> subprocess.CompletedProcess[str]:
    """What the user sees of an error from inside a verb."""
    code = (
        "import errno, os, socket, sys, click, qcore.cli.main as cli\n"
        "def verb():\n"
        "    click.echo('begun')\n"
        f"    {raises}\n"
        "cli.cli.get_command = lambda ctx, name: click.Command(name, callback=verb)\n"
        "sys.argv = ['qcore', 'plan']\ncli.main()\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_pipe_that_is_not_the_output_is_no_reader_that_left() -> None:
    done = verb_that("one, two = socket.socketpair(); two.close(); one.send(b'x')")
    assert (done.stdout, done.returncode) == ("begun\n", 65)
    assert done.stderr.startswith("error[QC-CLI-006] cannot be used: found Broken pipe")


def test_a_disk_that_is_full_is_not_the_output() -> None:
    done = verb_that("raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))")
    assert (done.stdout, done.returncode) == ("begun\n", 65)
    assert done.stderr.startswith("error[QC-CLI-006] cannot be used: found No space left")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_long_line_on_a_full_disk_is_the_output() -> None:
    """One that goes past every buffer, so that nothing is left to be written again."""
    code = (
        "import click, qcore.cli.main as cli, sys\n"
        "cli.cli.get_command = lambda ctx, name: click.Command(\n"
        "    name, callback=lambda: click.echo('x' * 99999))\n"
        "sys.argv = ['qcore', 'plan']\ncli.main()\n"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 73
    assert done.stderr.startswith("error[QC-CLI-007] standard output: cannot be written")
