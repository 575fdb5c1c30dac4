"""A rank that fails, is gone, does not arrive or is slow is named; the ranks are threads here."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore

from qcore.errors import InputError, QcoreError
from qcore.parallel import watch
from qcore.parallel.failure import Failure
from qcore.parallel.watch import Peers


class Ended:
    """Where a rank notes what would have ended its process."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.failure: Failure | None = None

    def __call__(self, failure: Failure) -> None:
        self.failure = failure
        self.event.set()

    def after(self, seconds: float = 10.0) -> Failure:
        assert self.event.wait(seconds)
        assert self.failure is not None
        return self.failure


Started = Callable[..., tuple[list[Peers], list[Ended]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    monkeypatch.setattr(watch, "_BEAT", 0.05)
    monkeypatch.setattr(watch, "_UNKNOWN", 0.3)
    running: list[Peers] = []

    def start(size: int = 2, timeout: float = 0.4) -> tuple[list[Peers], list[Ended]]:
        store, ends = HashStore(), [Ended() for _ in range(size)]
        running.extend(
            Peers(store, rank, size, f"rank {rank} (host)", timeout=timeout, end=ends[rank])
            for rank in range(size)
        )
        for peers in running:
            peers.start()
        return running, ends

    yield start
    for peers in running:
        peers.leave()


def test_a_rank_that_does_not_arrive_is_named(started: Started) -> None:
    (first, second), ends = started()
    for peers in (first, second):
        with peers.collective("the sum of step 1"):
            pass
    with first.collective("the sum of step 2"):
        failure = ends[0].after()
    assert (failure.rank, failure.kind, failure.error.code) == (1, "hang", "QC-PARALLEL-012")
    assert failure.named().message.startswith(
        "rank 1 (host): does not arrive at the sum of step 2: found nothing for 0 s after the sum"
    )
    assert not ends[1].event.is_set()


def test_a_rank_that_is_only_late_is_not(started: Started) -> None:
    (first, second), ends = started(timeout=1.0)
    with first.collective("the sum of step 1"):
        time.sleep(0.5)
        with second.collective("the sum of step 1"):
            pass
    with first.collective("the rows", patient=True):
        time.sleep(1.5)
    assert not any(end.event.is_set() for end in ends)


def test_a_process_that_is_gone_is_named(started: Started) -> None:
    (first, _), ends = started(timeout=30.0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    while 1 not in first._others:
        time.sleep(0.01)
    assert first.lost() is None
    first._others[1]["pid"] = gone.pid
    failure = ends[0].after()
    assert (failure.rank, failure.kind, failure.error.code) == (1, "gone", "QC-PARALLEL-011")
    assert first.failing()


def test_a_rank_that_has_left_is_not_missed(started: Started) -> None:
    (first, second), ends = started()
    while 1 not in first._others:
        time.sleep(0.01)
    second.leave()
    with first.collective("publishing"):
        time.sleep(1.0)
    first._others[1]["pid"] = 2**30
    time.sleep(0.2)
    assert not ends[0].event.is_set()


def test_the_failure_of_a_rank_reaches_all(started: Started) -> None:
    peers, ends = started(size=3, timeout=30.0)
    error = InputError("QC-DATA-001", "is wrong")
    peers[2].publish(Failure(rank=2, by=2, place="rank 2 (host)", error=error))
    for end in ends[:2]:
        assert end.after().error.code == "QC-DATA-001"
    assert [each.may_speak() for each in peers] == [True, False, False]


def test_a_rank_that_saves_is_not_ended_before_it_has(started: Started) -> None:
    (first, second), ends = started(timeout=30.0)
    with first.finishing():
        second.publish(
            Failure(rank=1, by=1, place="rank 1", error=InputError("QC-DATA-001", "is wrong"))
        )
        time.sleep(0.5)
        assert not ends[0].event.is_set()
    ends[0].after()


def test_a_lost_connection_without_a_cause_is_an_error(started: Started) -> None:
    (first, _), ends = started(timeout=30.0)
    with (
        pytest.raises(QcoreError, match="lost their connection in the sum") as raised,
        first.collective("the sum"),
    ):
        raise RuntimeError("Connection reset by peer\nmore")
    assert raised.value.code == "QC-PARALLEL-013"
    assert raised.value.found == "Connection reset by peer"
    assert not ends[1].event.is_set()


def test_a_slow_rank_is_named_once(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    peers, _ = started(size=3, timeout=30.0)
    now = [0.0] * 3

    def step(rank: int, own: float, waited: float, tokens: int = 100) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(watch.time, "monotonic", lambda: now[rank] + own + waited)
            peers[rank]._began = now[rank]
            peers[rank].step(tokens, waited)

    for _ in range(2 * watch._STEPS):
        for rank, own in enumerate((1.0, 1.1, 1.7)):
            step(rank, own, 1.7 - own)
    deadline = time.monotonic() + 5.0
    lines: list[str] = []
    while time.monotonic() < deadline and not lines:
        lines = peers[0].slow()
        time.sleep(0.02)
    (line,) = lines
    assert line.startswith("rank 2 (host) is slow: 1.70 s of its own a step, 1.00 s at the pace")
    time.sleep(0.3)
    assert peers[0].slow() == []
    for _ in range(watch._STEPS):  # longer, with more to do; and a rank without rows
        for rank, tokens in enumerate((100, 1000, 0)):
            step(rank, tokens / 100, 10.0 - tokens / 100, tokens)
    time.sleep(0.3)
    assert peers[0].slow() == []


def test_a_killed_launcher_ends_its_ranks(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    (first, _), _ = started(timeout=30.0)
    monkeypatch.setattr(watch.os, "kill", lambda pid, number: sent.append((pid, number)))
    first._parent = 1 if os.getppid() != 1 else 2
    deadline = time.monotonic() + 5.0
    while not any(number for _, number in sent) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [each for each in sent if each[1]] == [(os.getpid(), 15)]
