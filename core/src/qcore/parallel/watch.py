"""Watches the other ranks of a run: which has failed, is gone, does not arrive, or is slow.

This file decides when a rank counts as lost and which rank is named. Each rank has a thread that
puts a beat into the store of torchrun: how many collectives it has entered, and its own seconds a
step. A rank that waits in a collective compares the numbers: those with a lower one are late. The
thread ends the process where the main thread cannot, because it waits in a collective that never
ends. What is then printed, and by which process, is up to `rank`.

Codes: ``QC-PARALLEL-012`` a rank does not reach a collective, ``-013`` the connection was lost.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from ..errors import QcoreError
from .failure import LOST, Failure, vanished
from .rank import saving

_BEAT: Final = 1.0  # seconds between beats
_URGENT: Final = 0.05  # the same, after a collective has failed
_SILENT: Final = 120.0  # seconds without a beat after which a rank of another machine is gone
_UNKNOWN: Final = 5.0  # seconds in which the cause of a failed collective must show
_SAVE: Final = 600.0  # seconds for which a checkpoint that is being written is waited for
_STEPS: Final = 8  #: steps over which the pace of a rank is judged
_SLOW: Final = 1.5  # times the median of the others
_SHORT: Final = 0.05  # seconds a step by which a slow rank differs at least


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        number: counts the beats.
        entered: collectives that it has begun.
        where: the newest of them.
        patient: it waits in a collective that may take hours.
        pace: median of its own seconds a token; 0: unknown yet, or it has no rows.
        own: median of its own seconds a step.
        left: it has finished.
    """

    number: int = 0
    entered: int = 0
    where: str = ""
    patient: bool = False
    pace: float = 0.0
    own: float = 0.0
    left: bool = False


class Peers:
    """The other ranks, as this one sees them.

    Args:
        store: a `torch.distributed.Store` that no other thread uses.
        rank: of this process.
        size: how many ranks there are.
        name: of this process, for errors.
        timeout: seconds after which a rank that does not arrive is lost.
        end: ends this process; called in the thread of the watch.
    """

    def __init__(
        self, store: Any, rank: int, size: int, name: str, *,
        timeout: float, end: Callable[[Failure], None],
    ) -> None:  # fmt: skip
        self.timeout, self.name = timeout, name
        self._store, self._rank, self._size = store, rank, size
        self._end = end
        self._number = self._entered = 0
        self._where, self._patient, self._left = "", False, False
        self._waited, self._began = 0.0, time.monotonic()
        self._paces: deque[tuple[float, float]] = deque(maxlen=_STEPS)  # a token, a step
        self._beats: dict[int, Beat] = {}
        self._seen: dict[int, tuple[int, float]] = {}  # number of the newest beat, and when
        self._late: dict[int, tuple[int, float]] = {}  # collectives of a late rank, since when
        self._others: dict[int, dict[str, Any]] = {}
        self._told_slow: set[int] = set()
        self._slow: list[str] = []
        self._finishing = threading.Lock()
        self._wake = threading.Event()
        self._urgent = False
        self._parent = os.getppid()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        about = {"name": name, "machine": _machine(), "pid": os.getpid()}
        self._store.set(f"rank/{rank}", json.dumps(about))
        self._beat()

    def start(self) -> None:
        """Begin to watch the ranks that have connected."""
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Note that this rank has finished; it is not missed any more."""
        self._left = True
        with suppress(RuntimeError):
            self._beat()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2 * _BEAT)

    @contextmanager
    def collective(self, where: str, *, patient: bool = False) -> Iterator[None]:
        """What a collective runs in.

        Args:
            where: for errors: ``the gradients of step 3``.
            patient: other ranks may arrive hours later.

        Raises:
            QcoreError: ``QC-PARALLEL-013``; where the cause is known the process ends instead.
        """
        self._entered, self._where, self._patient = self._entered + 1, where, patient
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise self.unexplained(_disconnected(where, error)) from error
        finally:
            self._patient = False
            self._waited += time.monotonic() - began

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """A block that this process does not end in because of another rank: it saves."""
        with self._finishing, saving():
            yield

    def step(self, tokens: int, waited: float = 0.0) -> None:
        """Note that a step has ended.

        Args:
            tokens: that this rank computed in it.
            waited: seconds of it that the device waited in collectives while the host did not.
        """
        now = time.monotonic()
        own = now - self._began - self._waited - waited
        self._paces.append((own / tokens if tokens else 0.0, own))
        self._began, self._waited = now, 0.0

    def slow(self) -> list[str]:
        """A line for each rank that was newly recognized as slow."""
        lines, self._slow = self._slow, []
        return lines

    def publish(self, failure: Failure) -> None:
        """Put the record of a failure into the store."""
        with suppress(RuntimeError), self._lock:
            self._store.set(f"failed/{self._rank}", json.dumps(failure.as_json()))
            self._store.add("failed", 1)

    def failures(self) -> list[Failure]:
        """The records that ranks have put into the store."""
        known = []
        with suppress(RuntimeError), self._lock:
            if self._store.add("failed", 0):
                for rank in range(self._size):
                    if self._store.check([f"failed/{rank}"]):
                        known.append(
                            Failure.from_json(json.loads(self._store.get(f"failed/{rank}")))
                        )
        return known

    def may_speak(self) -> bool:
        """Whether this is the first rank that asks to print the error of the run."""
        with suppress(RuntimeError), self._lock:
            return bool(self._store.add("spoken", 1) == 1)
        return True

    def failing(self) -> bool:
        """Whether another rank has failed or is gone."""
        return self._urgent or self.lost() is not None or bool(self.failures())

    def lost(self) -> Failure | None:
        """A rank whose process is gone."""
        now = time.monotonic()
        for rank, about in self._others.items():
            if self._beats.get(rank, Beat()).left:
                continue
            if about["machine"] == _machine():
                gone = not _alive(about["pid"])
            else:
                gone = now - self._seen.get(rank, (0, now))[1] > min(_SILENT, self.timeout)
            if gone:
                return vanished(rank, about["name"], self._rank)
        return None

    def late(self) -> Failure | None:
        """A rank that has not reached the collective in which this one waits, for too long."""
        now, own = time.monotonic(), self._entered
        for rank, beat in self._beats.items():
            if rank == self._rank or beat.left or beat.entered >= own or self._patient:
                self._late.pop(rank, None)
                continue
            entered, since = self._late.get(rank, (-1, now))
            if entered != beat.entered:
                entered, since = beat.entered, now
            self._late[rank] = entered, since
            if now - since > self.timeout:
                return self._hang(rank)
        return None

    def _hang(self, rank: int) -> Failure:
        at = self._beats[rank].where
        after = f"after {at}" if at else "at its first collective"
        error = QcoreError(
            "QC-PARALLEL-012",
            f"does not arrive at {self._where}",
            found=f"nothing for {self.timeout:.0f} s {after}",
            fix=f"if it only needs longer, set rank_timeout; else {LOST}",
        )
        name = self._others.get(rank, {}).get("name", f"rank {rank}")
        return Failure(rank=rank, by=self._rank, place=name, error=error, kind="hang")

    def unexplained(self, error: QcoreError) -> QcoreError:
        """Mark an error that another rank has caused, if the watch does not name that in time.

        The watch ends the process as soon as it knows the cause.
        """
        self._urgent = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            time.sleep(_UNKNOWN)
        error.lost = self._contact(error)  # type: ignore[attr-defined]
        return error

    def _contact(self, error: QcoreError) -> Failure:
        return Failure(rank=self._rank, by=self._rank, place=self.name, error=error, kind="contact")

    # What follows runs in the thread.

    def _beat(self) -> None:
        self._number += 1
        paces = [*self._paces] if len(self._paces) == _STEPS else [(0.0, 0.0)]
        pace, own = map(statistics.median, zip(*paces, strict=True))
        beat = [self._number, self._entered, self._where, self._patient, pace, own, self._left]
        with self._lock:
            self._store.set(f"beat/{self._rank}", json.dumps(beat))

    def _watch(self) -> None:
        fails = 0
        while not self._left:
            self._wake.wait(_URGENT if self._urgent else min(_BEAT, self.timeout / 4))
            self._wake.clear()
            if os.getppid() != self._parent:  # killed: nothing else would end this rank
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                self._beat()
                self._look()
                fails = 0
            except RuntimeError as error:
                fails += 1
                if fails * _BEAT > _UNKNOWN and not self._left:
                    self._finish(self._contact(_disconnected("the store of torchrun", error)))
                    return
                time.sleep(_BEAT)
                continue
            failed = self.failures()
            failure_seen = next(iter(failed), None) or self.lost() or self.late()
            if failure_seen is not None and not self._left:
                self._finish(failure_seen)
                return
            if self._rank == 0:
                self._judge_paces()

    def _look(self) -> None:
        """Read the beats of the ranks that have connected."""
        for rank in {*range(self._size)} - {self._rank, *self._others}:
            with self._lock:
                if self._store.check([f"rank/{rank}", f"beat/{rank}"]):
                    self._others[rank] = json.loads(self._store.get(f"rank/{rank}"))
        known = [self._rank, *self._others]
        with self._lock:
            texts = self._store.multi_get([f"beat/{rank}" for rank in known])
        now = time.monotonic()
        for rank, text in zip(known, texts, strict=True):
            beat = self._beats[rank] = Beat(*json.loads(text))
            if self._seen.get(rank, (0, 0.0))[0] != beat.number:
                self._seen[rank] = beat.number, now

    def _finish(self, failure: Failure) -> None:
        """End this process, once a checkpoint that it writes is complete."""
        self._finishing.acquire(timeout=_SAVE)
        self._end(failure)

    def _judge_paces(self) -> None:
        """Note a rank whose own part of a step takes much longer than that of the others."""
        paces = {rank: beat.pace for rank, beat in self._beats.items() if beat.pace}
        if len(paces) < self._size:
            return
        for rank, pace in paces.items():
            usual = statistics.median_low([p for other, p in paces.items() if other != rank])
            own = self._beats[rank].own
            longer = own * (1 - usual / pace)  # than at the pace of the others
            if rank not in self._told_slow and pace > _SLOW * usual and longer > _SHORT:
                self._told_slow.add(rank)
                name = self._others[rank]["name"] if rank in self._others else self.name
                self._slow.append(
                    f"{name} is slow: {own:.2f} s of its own a step, {own - longer:.2f} s at the "
                    f"pace of the other ranks (median of {_STEPS} steps); they wait for it"
                )


def _disconnected(where: str, reason: RuntimeError) -> QcoreError:
    """The error of a collective that failed for a reason that no rank has given."""
    found = str(reason).partition("\n")[0][:200]
    what = f"the ranks lost their connection in {where}"
    return QcoreError("QC-PARALLEL-013", what, found=found, fix=LOST)


@cache
def _machine() -> str:
    """A name that two processes share if one can see the other by its id."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')} {_boot()}"
    return socket.gethostname()


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
