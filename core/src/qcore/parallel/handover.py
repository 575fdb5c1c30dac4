"""To whom a rank hands its error, and which process speaks for all ranks.

This file decides who speaks when ranks fail. Under ``qcore train --gpus`` it is the launcher, which
reads the record that each rank leaves; under a plain ``torchrun`` it is one of the ranks, which
agree on it through the store of ``torchrun``. It imports no torch. Which failure is the cause is up
to `failure`; how a rank notices that another is lost, to `watch`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NoReturn

from ..errors import Interrupted, QcoreError
from .failure import Failure, cause, without_echoes
from .rank import Seat, seat
from .watch import Peers

_ALIKE: Final = 2.0  # seconds in which other ranks fail for the same reason
_FIRST: Final = 1.0  # seconds that the rank with the cause has for saying it
_SAVING: Final = 3600.0  # seconds for which a rank waits until the first one has saved
_POLL: Final = 0.05
_ASKED: Final = 0.3  # seconds in which the launcher notes a signal that all processes got
#: In the exceptions of collectives; gloo raises a plain RuntimeError.
_OF_BACKENDS: Final = ("gloo", "Gloo", "NCCL")

_handing = threading.Lock()
_peers: Peers | None = None
_speak: Callable[[QcoreError], None] | None = None


def spoken_by(speak: Callable[[QcoreError], None]) -> None:
    """Set what prints the error of the run at once; it is called in another thread."""
    global _speak
    _speak = speak


def watch(store: Any, rank: int, size: int, name: str, timeout: float) -> Peers:
    """Watch the other ranks from now on.

    Args:
        store: of the ranks that run now, for this use alone.
        rank: of this process.
        size: how many ranks there are.
        name: of this process, for errors.
        timeout: seconds after which a rank that does not arrive is lost.
    """
    peers = Peers(store, rank, size, name, timeout=timeout, end=end_process)
    peers.start()
    watched_by(peers)
    return peers


def watched_by(peers: Peers | None) -> None:
    """Set what watches the other ranks from now on."""
    global _peers
    _peers = peers


def quiet_in_failure(say: Callable[[str], None]) -> Callable[[str], None]:
    """Let only the first rank say what a signal leads to, and not where a rank has failed.

    torchrun ends the other ranks by SIGTERM then, which no user has sent.
    """
    own = seat()
    if own is None:
        return say
    if own.rank:
        return lambda line: None

    def speak(line: str) -> None:
        by_torchrun = line.startswith(signal.SIGTERM.name) and not own.asked_to_stop(_ASKED)
        if not by_torchrun and not own.siblings() and not (_peers and _peers.failing()):
            say(line)

    return speak


def last_words(leave: Callable[[QcoreError], None]) -> Callable[[QcoreError], None]:
    """Say them, or leave them to the launcher, which ends all ranks."""
    own = seat()
    file = None if own is None else own.file
    if file is None or own is None or not own.launched:
        return leave
    return lambda error: of_error(error).write(file)


def end_process(failure: Failure) -> NoReturn:
    """End this process because of another rank; called where the main thread may be stuck."""
    shown = hand_over(failure)
    if shown is not None and _speak is not None:
        _speak(shown)
    os._exit(failure.error.exit_code)


def hand_over(failure: Failure) -> QcoreError | None:
    """Leave the record of a failure, and wait until it is clear what the cause is.

    Args:
        failure: of this rank, or of another one as this rank sees it.

    Returns:
        The error that this process must print; ``None`` if another process speaks.
    """
    own = seat()
    if own is None:
        return failure.error
    if not _handing.acquire(blocking=False):  # another thread ends this process
        time.sleep(_SAVING)
    if own.file is not None:
        failure.write(own.file)
    peers = _peers or (None if own.launched else _connected(own))
    if peers is not None:
        peers.publish(failure)
    known = _gathered(own, peers, failure)
    if own.launched:
        return None
    if peers is None:
        return failure.error if own.rank == 0 else failure.named()
    if cause(known) is not cause([failure]):
        time.sleep(_FIRST)
    return cause(known) if peers.may_speak() else None


def _gathered(own: Seat, peers: Peers | None, failure: Failure) -> list[Failure]:
    """All failures that are known once each rank had the time to fail.

    A rank that a signal stopped waits for the first one, which writes the checkpoint: torchrun
    kills the ranks that remain some time after one has ended.
    """
    stopped = isinstance(failure.error, Interrupted) and own.rank > 0
    deadline = time.monotonic() + (_SAVING if stopped else _ALIKE)
    while True:
        files, shared = own.siblings(), peers.failures() if peers else []
        known = {f.by: f for f in [*files, *shared, failure]}
        gone = stopped and peers is not None and peers.lost() is not None
        if max(len(files), len(shared)) == own.size or (stopped and 0 in known) or gone:
            break
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL)
    return without_echoes(known.values())


def _connected(own: Seat) -> Peers | None:
    """A connection for a rank that fails before it knows the others."""
    from . import store

    if not store.serves():
        return None
    with suppress(RuntimeError, ValueError, OSError, KeyError):
        shared = store.connect(_ALIKE)
        number = store.number_of_round(shared, own.rank, own.size, _ALIKE)
        return Peers(
            store.prefixed(shared, number, "watch"), own.rank, own.size, own.name(),
            timeout=60.0, end=end_process,
        )  # fmt: skip
    return None


def of_error(error: QcoreError, trace: str = "") -> Failure:
    """The record of an error that this rank raised.

    Raises:
        RuntimeError: this process is not one of several ranks.
    """
    own = seat()
    if own is None:
        raise RuntimeError("this process is not one of several ranks")
    if _peers is not None and _of_collective(error.__cause__):
        error = _peers.unexplained(error)
    lost: Failure | None = getattr(error, "lost", None)
    if lost is not None:
        return lost
    return Failure(rank=own.rank, by=own.rank, place=own.name(), error=error, trace=trace)


def _of_collective(reason: BaseException | None) -> bool:
    """Whether an exception comes from a collective that this package did not call itself."""
    if not isinstance(reason, RuntimeError):
        return False
    from torch.distributed import DistError

    return isinstance(reason, DistError) or any(word in str(reason) for word in _OF_BACKENDS)
