"""``qcore train --gpus N``: passes signals on to the ranks, and speaks for them.

This file decides what the launcher does while torchrun's agent runs the ranks: it passes signals
on, ends what remains of a run that failed, and raises one error for all ranks. How the agent is
started is up to `agent`; what a rank leaves, to `rank` and `handover`; which failure is the cause,
to `failure`.

Codes: ``QC-PARALLEL-010`` torchrun has started the ranks, ``-014`` torchrun itself failed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ..errors import Failure as Raised
from ..errors import Interrupted, QcoreError, UsageError, contained
from ..io.stop_signals import hung_up, terminal_answers
from .agent import run_agent, unfit
from .failure import PERMANENT, Failure, cause, ended, read, without_echoes
from .rank import ASKED, PID, SAVING

_STOPS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
_ONE_PRESS: Final = 0.5  # seconds in which two SIGINT count as one
_POLL: Final = 0.05
_REMAIN: Final = 5.0  # seconds for which ranks may outlive one that failed
_WORDS: Final = 1.5  # seconds in which the first rank says its last words
_ERROR: Final = "error.json"


def launch(
    gpus: int, arguments: Sequence[str], *, device: str, restarts: bool,
    leave: Callable[[QcoreError], None], debug: bool = False,
) -> int:  # fmt: skip
    """Run a command as several ranks on this machine.

    Args:
        gpus: how many ranks, one for each GPU.
        arguments: of ``qcore``, the same for every rank.
        device: ``auto``, ``cpu`` or ``cuda``.
        restarts: torchrun may start the ranks again, as its variable ``PET_MAX_RESTARTS`` says.
        leave: shows the last words before a second Ctrl-C ends the process.
        debug: show the traceback of the rank that failed.

    Returns:
        The exit status, if a rank has printed why it is not 0.

    Raises:
        QcoreError: of the rank that failed; ``QC-PARALLEL-010``, ``-014``.
    """
    if gpus < 1:
        raise unfit(gpus, "at least 1", "leave --gpus out for one process")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError(
            "QC-PARALLEL-010", "torchrun has started the ranks", field="--gpus",
            fix="leave --gpus out, or start qcore without torchrun",
        )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="qcore-ranks-"))
    try:
        return _Launcher(folder, gpus, arguments, device, restarts, leave, debug).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Launcher:
    """The main thread passes signals on; torchrun's agent runs in another one."""

    def __init__(
        self, folder: Path, gpus: int, arguments: Sequence[str], device: str,
        restarts: bool, leave: Callable[[QcoreError], None], debug: bool,
    ) -> None:  # fmt: skip
        self._say_last = leave
        self._folder, self._gpus, self._arguments = folder, gpus, arguments
        self._device, self._restarts, self._debug = device, restarts, debug
        self._attempt: Path | None = None  # the folder of the ranks that run
        self._places: dict[int, str] = {}  # local rank -> name
        self._outcome: Mapping[int, Any] | BaseException = {}  # rank -> failure
        self._received: list[int] = []
        self._passed: dict[int, set[int]] = {}  # process -> signals that it got
        self._stop = 0  # the signal that asked the run to stop
        self._stopped_at = self._failed_at = float("inf")
        self._had_terminal = terminal_answers()

    def run(self) -> int:
        before = self._handle_signals()
        agent = threading.Thread(target=self._agent, name="torchrun", daemon=True)
        try:
            agent.start()
            while agent.is_alive():
                agent.join(_POLL)
                self._pass_on()
                self._end_remaining()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._status()

    # -- signals

    def _handle_signals(self) -> dict[int, Any]:
        """Handle what the parent process does not ignore; ranks inherit what it ignores."""
        before: dict[int, Any] = {}
        for number in (*_STOPS, signal.SIGUSR1):
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, self._handle)
        return before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def _pass_on(self) -> None:
        """Send to every rank what was received, once it handles signals."""
        while self._received:
            number = self._received.pop(0)
            if number == signal.SIGUSR1 or (
                number == signal.SIGHUP and hung_up(self._had_terminal)
            ):
                for pid in [*self._pids().values()][:1]:  # the ranks agree on the step
                    _kill(pid, signal.SIGUSR1)
                continue
            again = time.monotonic() - self._stopped_at > _ONE_PRESS
            if number == signal.SIGINT and again:
                self._leave()
            if not self._stop:
                self._stop, self._stopped_at = number, time.monotonic()
        if self._stop and self._attempt is not None:
            (self._attempt / ASKED).touch()
            for pid in self._pids().values():
                passed = self._passed.setdefault(pid, set())
                if self._stop not in passed:
                    passed.add(self._stop)
                    _kill(pid, self._stop)

    def _leave(self) -> None:
        """A second Ctrl-C: the first rank has its last words, then everything ends at once."""
        pids = self._pids()
        if 0 in pids:
            _kill(pids[0], signal.SIGINT)
            deadline = time.monotonic() + _WORDS
            while time.monotonic() < deadline and not self._records():
                time.sleep(_POLL)
        for pid in pids.values():
            _kill(pid, signal.SIGKILL)
        error: QcoreError = Interrupted(
            "QC-TRAIN-006", "ended by a second Ctrl-C", fix="run the same command again"
        )
        error = next((f.error for f in self._records() if isinstance(f.error, Interrupted)), error)
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._say_last(error)
        finally:
            os._exit(error.exit_code)

    def _end_remaining(self) -> None:
        """Kill ranks that outlive one that failed: they may hang, or be stopped."""
        records = self._records()
        failed = any(not isinstance(record.error, Interrupted) for record in records)
        if not failed and self._failed_at == float("inf"):
            spoke = {self._places.get(record.by) for record in records}
            failed = any(
                not _alive(pid) and self._place(local) not in spoke
                for local, pid in self._pids().items()
            )
        if failed and self._failed_at == float("inf"):
            self._failed_at = time.monotonic()
        if time.monotonic() - self._failed_at > _REMAIN:
            for local, pid in self._pids().items():
                if self._attempt and not (self._attempt / str(local) / SAVING).exists():
                    _kill(pid, signal.SIGKILL)

    # -- files of the ranks

    def _pids(self) -> dict[int, int]:
        """Processes that handle signals, by local rank."""
        pids = {}
        if self._attempt is not None:
            for local in range(self._gpus):
                with suppress(OSError, ValueError):
                    pids[local] = int((self._attempt / str(local) / PID).read_text())
        return pids

    def _place(self, local: int) -> str:
        return [*self._places.values()][local]

    def _records(self) -> list[Failure]:
        if self._attempt is None:
            return []
        files = (self._attempt / str(local) / _ERROR for local in range(self._gpus))
        return [record for file in files if (record := read(file)) is not None]

    def _placed(self, envs: Mapping[int, Mapping[str, str]]) -> tuple[dict[int, str], ...]:
        """Folders for the ranks of the next attempt: stdout, stderr, error file of each.

        Raises:
            QcoreError: of the last attempt, if another one makes no sense.
        """
        if self._attempt is not None:
            self._refuse_restart()
        elif self._stop:
            raise self._not_started()
        attempt = self._folder / str(envs[0]["TORCHELASTIC_RESTART_COUNT"])
        shutil.rmtree(attempt, ignore_errors=True)
        for local in envs:
            (attempt / str(local)).mkdir(parents=True)
        self._attempt, self._failed_at = attempt, float("inf")
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        gpu = self._device != "cpu"
        host = os.uname().nodename
        self._places = {
            rank: f"rank {rank} ({host}, GPU {local})" if gpu else f"rank {rank} ({host})"
            for local, rank in ranks.items()
        }
        quiet = {local for local, rank in ranks.items() if rank}
        return (
            {local: str(attempt / str(local) / "out") if local in quiet else "" for local in envs},
            {local: str(attempt / str(local) / "err") if local in quiet else "" for local in envs},
            {local: str(attempt / str(local) / _ERROR) for local in envs},
        )

    def _refuse_restart(self) -> None:
        records = without_echoes(self._records())
        if self._stop or not self._restarts:
            raise cause(records, stopping=bool(self._stop)) if records else self._not_started()
        if records and cause(records).exit_code in PERMANENT:
            raise cause(records)
        if records:
            sys.stderr.write(f"{cause(records).message}; torchrun starts the ranks again\n")

    def _not_started(self) -> QcoreError:
        name = signal.Signals(self._stop).name if self._stop else "torchrun"
        return Interrupted(
            "QC-TRAIN-006", f"stopped by {name} while the ranks were started",
            fix="run the same command again",
        )  # fmt: skip

    # -- the thread of the agent

    def _agent(self) -> None:
        run = partial(run_agent, self._gpus, self._arguments, self._device, self._placed)
        outcome = contained(partial(run, debug=self._debug), prints=True)
        # The main thread raises it.
        self._outcome = outcome.error or {} if isinstance(outcome, Raised) else outcome

    # -- the result

    def _status(self) -> int:
        outcome = self._outcome
        if isinstance(outcome, QcoreError):
            raise outcome
        if isinstance(outcome, BaseException):
            # The agent of another machine may have ended with its ranks before.
            if records := without_echoes(self._records()):
                raise cause(records, stopping=bool(self._stop)) from outcome
            raise QcoreError(
                "QC-PARALLEL-014",
                "torchrun could not run the ranks",
                found=f"{type(outcome).__name__}: {str(outcome).partition(chr(10))[0][:200]}",
                fix="check that the machines reach each other at the endpoint of the rendezvous",
            ) from outcome
        if not outcome:
            return 0
        written = {record.by: record for record in self._records()}
        failures = [*written.values()]
        for rank, failure in outcome.items():
            place = self._places.get(rank, f"rank {rank}")
            if rank in written or failure.exitcode == -signal.SIGTERM:
                continue
            if rank == 0 and failure.exitcode in (73, 141):  # its output could not be written
                return int(failure.exitcode)
            failures.append(ended(rank, place, failure.exitcode))
        if not failures:  # torchrun ended ranks that did not handle signals yet
            failures = [
                ended(rank, self._places.get(rank, f"rank {rank}"), failure.exitcode)
                for rank, failure in outcome.items()
            ]
        kept = _explained(failures)
        self._show_output(kept)
        raise cause(kept, stopping=bool(self._stop))

    def _show_output(self, failures: Sequence[Failure]) -> None:
        """Show what a rank has printed that ended without an error, such as an abort in C++."""
        error = cause(failures, stopping=bool(self._stop))
        chosen = next(f for f in failures if f.error.code == error.code)
        if self._debug and chosen.by:  # the first rank has printed its own
            sys.stderr.write(chosen.trace)
        if chosen.kind != "gone" or self._attempt is None:
            return
        local = next((n for n, p in enumerate(self._places.values()) if p == chosen.place), None)
        with suppress(OSError, TypeError):
            text = (self._attempt / str(local) / "err").read_text("utf-8", "replace")
            sys.stderr.writelines(f"{line}\n" for line in text.splitlines()[-20:])


def _explained(failures: Sequence[Failure]) -> list[Failure]:
    """Failures of which each rank has one, the account of the launcher before that of others."""
    ends = {failure.rank for failure in failures if failure.by == failure.rank}
    kept = [f for f in failures if f.kind != "gone" or f.by == f.rank or f.rank not in ends]
    return without_echoes(kept)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
