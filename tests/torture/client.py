"""Runs a command in a forked process and says how it ended.

This file decides limits: a command that exceeds its time is killed and counts as hung.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

_TESTS: Final = Path(__file__).resolve().parents[1]
LIMIT: Final = 60.0  #: seconds that a command of these sizes may take


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit status; negative: the signal that killed it.
        seconds: from the fork on.
        out: standard output.
        err: standard error.
        hung: it was killed because it took longer than its limit.
    """

    status: int
    seconds: float
    out: str
    err: str
    hung: bool

    @property
    def last_line(self) -> str:
        """The last line on standard error."""
        return (self.err.strip().splitlines() or [""])[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What is run.

    Attributes:
        program: a name of `programs.PROGRAMS`.
        arguments: its arguments.
        options: for the program itself, such as the step that stops it.
        env: added to the environment.
    """

    program: str = "qcore"
    arguments: Sequence[str]
    options: Mapping[str, Any]
    env: Mapping[str, str]


class Client:
    """A server, and requests to it. A context manager.

    Args:
        scratch: folder for output files.
        shim: library to load before all others; ``None``: no calls are counted.
    """

    def __init__(self, scratch: Path, shim: Path | None) -> None:
        self._scratch = scratch
        env = os.environ | {
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(_TESTS),
            "QCORE_DATA_CACHE_GB": "0", "TRITON_INTERPRET": "1", "TOKENIZERS_PARALLELISM": "false",
            "XDG_CACHE_HOME": str(scratch / "cache"),
        }  # fmt: skip
        if shim is not None:
            env["LD_PRELOAD"] = str(shim)
        with (scratch / "server.log").open("wb") as log:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "torture.server"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env,
                bufsize=0, cwd=scratch,
            )  # fmt: skip
        self._unread = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def run(
        self,
        command: Command,
        cwd: Path,
        *,
        control: Path | None = None,
        warm: bool = False,
        signals: Sequence[tuple[float, int]] = (),
        limit: float = LIMIT,
    ) -> Ended:
        """Run a command to its end.

        Args:
            command: the command.
            cwd: its working folder.
            control: control file of the shim.
            warm: afterwards the server imports what the command had imported.
            signals: (seconds after the start, number), in order; sent to the process alone.
            limit: seconds after which its process group is killed.
        """
        out, err = self._scratch / "stdout", self._scratch / "stderr"
        request = {
            "program": command.program, "arguments": list(command.arguments),
            "options": dict(command.options), "env": dict(command.env), "cwd": str(cwd),
            "control": str(control or ""), "out": str(out), "err": str(err),
            "modules": str(self._scratch / "modules") if warm else "",
        }  # fmt: skip
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        pid = self._answer(None)["pid"]
        begun, hung = time.monotonic(), False
        answer = None
        for after, number in signals:
            if answer is None:
                answer = self._answer(begun + after)
            if answer is None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(pid, number)
        if answer is None:
            answer = self._answer(begun + limit)
        if answer is None:
            hung = True
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            answer = self._answer(None)
        return Ended(answer["status"], answer["seconds"], _text(out), _text(err), hung)

    def _answer(self, until: float | None) -> Any:
        """The next line of the server; ``None`` if there is none in time."""
        assert self._server.stdout is not None
        # Read unbuffered: `select` would not see a line that a buffer has taken.
        while b"\n" not in self._unread:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._server.stdout], [], [], left)[0]:
                return None
            piece = os.read(self._server.stdout.fileno(), 4096)
            if not piece:
                log = (self._scratch / "server.log").read_text("utf-8", "replace")
                raise RuntimeError(f"the server of the torture runs ended: {log[-2000:]}")
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)


def _text(path: Path) -> str:
    return path.read_text("utf-8", "replace") if path.exists() else ""
