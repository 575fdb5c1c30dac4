"""Run the command line in this process or in one of its own, and look at what it printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from qcore.cli.main import main


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout; anything else there is an error."""
        return json.loads(self.out)

    def error(self, code: str) -> str:
        """The one line on stderr, of this code; nothing on stdout."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith(f"error[{code}] "), lines[0]
        assert self.out == ""
        assert "Traceback" not in self.err
        return lines[0]


def here(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ended:
    """``qcore ARGUMENTS`` in this process; an exception that is no error of ours escapes."""
    capsys.readouterr()
    with (
        _handlers(),
        mock.patch.object(sys, "argv", ["qcore", *map(str, arguments)]),
        mock.patch.object(sys, "excepthook"),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    out, err = capsys.readouterr()
    code = ended.value.code
    return Ended(code if isinstance(code, int) else 0, out, err)


@contextmanager
def _handlers() -> Iterator[None]:
    """Restore the handlers of signals, which a process that ends ignores."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def apart(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    command: tuple[str, ...] = (sys.executable, "-m", "qcore"),
    timeout: float = 120,
    **more: Any,
) -> Ended:
    """``python -m qcore ARGUMENTS`` in a process of its own."""
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        **more,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def modules_after(*arguments: object) -> tuple[Ended, set[str]]:
    """Top-level and dotted names of the modules that a command leaves imported."""
    code = (
        "import sys, qcore.cli.main as cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n"
        "    print('\\n'.join(sys.modules), file=sys.stderr)\n"
        "    raise\n"
    )
    ended = apart(*arguments, command=(sys.executable, "-c", code))
    return ended, set(ended.err.splitlines())
