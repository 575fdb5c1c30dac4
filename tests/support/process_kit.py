"""``qcore`` as a process with its own descriptors, terminal and signals, forked from this one.

A fork has torch imported, so that a run of the tiny model takes a second. Threads do not survive a
fork: the tests run with one thread for sums.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import sys
import termios
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from qcore.cli.main import main

CLOSED = -1  #: in place of a descriptor: the process starts without it
_HELD = 20.0  # seconds for which a place holds a process that is not interrupted


@dataclass(frozen=True, slots=True)
class Process:
    """A forked command line; `out` and `err` are its files, unless it got descriptors."""

    pid: int
    out: Path
    err: Path

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def status(self, timeout: float = 60.0) -> int:
        """The exit status; minus the signal that ended it."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            pid, ended = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(ended)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still runs after {timeout} s: {self.err.read_text()}")

    def lines(self) -> list[str]:
        """What it has printed on standard error."""
        return self.err.read_text().splitlines()


def forked(
    home: Path,
    *arguments: object,
    out: int | None = None,
    err: int | None = None,
    terminal: int | None = None,
    before: Callable[[], None] = lambda: None,
    env: Mapping[str, str] | None = None,
    group: bool = False,
) -> Process:
    """Start ``qcore ARGUMENTS``.

    Args:
        home: folder for the files of its output.
        out: descriptor of standard output; ``None``: a file.
        err: the same of standard error.
        terminal: slave of a pseudoterminal, for all that is ``None``; it controls the process.
        before: called in the process first, to replace a function.
        env: additional environment.
        group: make it the leader of a process group.
    """
    files = home / "stdout.txt", home / "stderr.txt"
    for file in files:
        file.write_bytes(b"")
    child = os.fork()
    if child:
        return Process(child, *files)
    status = 99
    try:
        os.environ.update(env or {})
        if group:
            os.setpgid(0, 0)
        _connect(files, out, err, terminal)
        before()
        with mock.patch.object(sys, "argv", ["qcore", *map(str, arguments)]):
            main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    except BaseException:  # noqa: BLE001, what Python would do at the end of a process
        traceback.print_exc()
        status = 98
    finally:
        os._exit(status)


def _connect(
    files: tuple[Path, Path], out: int | None, err: int | None, terminal: int | None
) -> None:
    """Descriptors, streams and handlers as a new process has them."""
    if terminal is not None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        os.dup2(terminal, 0)
    opened = [os.open(file, os.O_WRONLY | os.O_APPEND) for file in files]
    for number, fd, file in ((1, out, opened[0]), (2, err, opened[1])):
        if fd is None:
            fd = file if terminal is None else terminal
        if fd == CLOSED:
            os.close(number)
        else:
            os.dup2(fd, number)
    os.closerange(3, 1024)  # else the process would keep pipes and terminals open
    sys.stdout = None if out == CLOSED else open(1, "w", encoding="utf-8", closefd=False)  # type: ignore[assignment]  # noqa: SIM115
    sys.stderr = (
        None
        if err == CLOSED
        else open(  # type: ignore[assignment]  # noqa: SIM115
            2, "w", encoding="utf-8", buffering=1, closefd=False
        )
    )
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def held(owner: Any, name: str, mark: Path, *, at: int = 1, seconds: float = _HELD) -> None:
    """Make a function, in its call number `at`, write a file and wait before it goes on."""
    real, calls = getattr(owner, name), [0]

    def wait(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            mark.touch()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(0.02)
        return real(*args, **kwargs)

    setattr(owner, name, wait)


def wait_for(path: Path, process: Process | None = None, timeout: float = 60.0) -> None:
    """Wait until a file exists."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, process.err.read_text() if process else path
        time.sleep(0.005)


def pseudoterminal() -> tuple[int, int]:
    """Master and slave."""
    return pty.openpty()


def read_terminal(master: int, until: str, timeout: float = 60.0) -> str:
    """What a terminal shows, up to and with `until`."""
    deadline, text = time.monotonic() + timeout, ""
    while until not in text:
        left = deadline - time.monotonic()
        assert left > 0, text
        if select.select([master], [], [], left)[0]:
            try:
                text += os.read(master, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                raise AssertionError(text) from None
    return text


def reader_that_leaves() -> int:
    """A pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer
