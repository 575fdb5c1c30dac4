"""Runs of several ranks on the CPU, as processes with their own signals; what each rank does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: A rank whose run is replaced by sums: what each rank does stands in the variable PLAN.
RANK = Path(__file__).with_name("rank_that_sums.py")


@dataclass(frozen=True, slots=True)
class Ranks:
    """A command that several ranks run, and the files it writes."""

    process: subprocess.Popen[bytes]
    home: Path
    began: float = field(default_factory=time.monotonic)

    def kill(self, number: int, rank: int | None = None) -> None:
        """Send a signal to the launcher, or to one rank."""
        os.kill(self.process.pid if rank is None else self.pid(rank), number)

    def pid(self, rank: int) -> int:
        """The process of a rank, which has noted it or is a child of the launcher."""
        file = self.home / f"pid-{rank}"
        if file.exists():
            return int(file.read_text())
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                environment = (process / "environ").read_bytes().split(b"\0")
                if int(parent) == self.process.pid and f"RANK={rank}".encode() in environment:
                    return int(process.name)
        raise AssertionError(self.err())

    def reached(self, mark: str, timeout: float = 60.0) -> None:
        """Wait until a rank has written a file."""
        deadline = time.monotonic() + timeout
        while not (self.home / mark).exists():
            assert self.process.poll() is None, self.err()
            assert time.monotonic() < deadline, self.err()
            time.sleep(0.01)

    def status(self, timeout: float = 90.0) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(self.err()) from None
        finally:
            self._none_left()

    def _none_left(self) -> None:
        """Every rank has ended."""
        for file in self.home.glob("pid-*"):
            deadline = time.monotonic() + 5.0
            while Path(f"/proc/{file.read_text()}").exists():
                if time.monotonic() > deadline:
                    os.kill(int(file.read_text()), signal.SIGKILL)
                    raise AssertionError(f"{file.name} still ran")
                time.sleep(0.02)

    def out(self) -> str:
        return (self.home / "stdout").read_text()

    def err(self) -> str:
        return (self.home / "stderr").read_text()

    def lines(self) -> list[str]:
        """What stands on standard error."""
        return self.err().splitlines()

    def error(self, code: str) -> str:
        """The one error on standard error."""
        errors = [line for line in self.lines() if line.startswith("error[")]
        assert len(errors) == 1, self.err()
        assert errors[0].startswith(f"error[{code}]"), errors[0]
        assert "Traceback" not in self.err()
        return errors[0]


def begin_run(home: Path, *arguments: object) -> Ranks:
    """Start ``qcore ARGUMENTS``."""
    home.mkdir(parents=True, exist_ok=True)
    start = [sys.executable, "-m", "qcore", *map(str, arguments)]
    with (home / "stdout").open("wb") as out, (home / "stderr").open("wb") as err:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return Ranks(subprocess.Popen(start, stdout=out, stderr=err, env=environment), home)


def begin(
    home: Path, plan: Mapping[str, Any], *arguments: object,
    gpus: int | None = 2, torchrun: tuple[str, ...] = (), env: Mapping[str, str] | None = None,
) -> Ranks:  # fmt: skip
    """Start ``qcore train --gpus`` whose ranks follow a plan, or the ranks under torchrun."""
    home.mkdir(parents=True, exist_ok=True)
    words = [
        "train", "--model", "m", "--data", "d", "--output", str(home / "out"), "--device", "cpu",
        *map(str, arguments),
    ]  # fmt: skip
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", *torchrun, str(RANK), *words]
    else:
        start = [sys.executable, str(RANK), *words, "--gpus", str(gpus)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PLAN": json.dumps(plan), "HOME_OF_MARKS": str(home), **(env or {}),
    }  # fmt: skip
    with (home / "stdout").open("wb") as out, (home / "stderr").open("wb") as err:
        return Ranks(subprocess.Popen(start, stdout=out, stderr=err, env=environment), home)
