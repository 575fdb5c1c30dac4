"""Signals of a run: which ones stop it, which one asks for a checkpoint, and what is said at once.

This file decides how signals are handled. `StopSignals` notes the first of SIGINT, SIGTERM, SIGHUP
and SIGXCPU, says within milliseconds what is being finished, and raises `StopNow` in blocks that
may be abandoned; SIGUSR1 asks for a checkpoint. A second Ctrl-C ends the process. `importing`
delays SIGINT while torch is imported. What is saved, and when a run stops, is up to the training
loop.

A thread reads the signals from Python's wakeup descriptor: a handler in Python runs only between
bytecodes of the main thread, which may wait for a device for as long as a step takes.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

from ..errors import Interrupted, QcoreError

_STOPS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
_SAVE: Final = signal.SIGUSR1
#: Launchers such as `timeout` forward a signal that the terminal has sent as well.
_ONE_PRESS: Final = 0.5  # seconds in which two signals count as one
_TERMINAL: Final = "/dev/tty"
_NEVER, _LATE, _NOW = range(3)


class StopNow(KeyboardInterrupt):
    """Raised by a signal in a block that may be abandoned.

    It is a `KeyboardInterrupt` because nothing may turn it into a failure of foreign code.
    """


class StopSignals:
    """A context manager that notes signals instead of ending the process; it can be nested.

    Signals that the parent process has set to be ignored stay ignored, as under ``nohup``, except
    SIGTERM. Other threads than the main thread cannot handle signals: nothing is noted there.

    Args:
        say: shows a line at once; called in another thread. It must not block.
        leave: shows the last words before a second Ctrl-C ends the process; called in another
            thread. Without it a second Ctrl-C raises `KeyboardInterrupt`.
        output: file descriptor whose reader must not leave: if it does, the run stops; -1: none.
        ends: the process ends after the block: leave the signals ignored, because one that comes
            then must not change the exit status.

    Attributes:
        asked: what asked the run to stop, the name of a signal; ``""`` before that.
        doing: what the run is finishing and what follows; shown with the first signal.
        grace: seconds that the run may take to end after a signal.
        reserve: seconds of `grace` that are needed to write a checkpoint.
        last_words: returns the error that a second Ctrl-C ends the process with.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None] | None = None,
        leave: Callable[[QcoreError], None] | None = None,
        output: int = -1,
        ends: bool = False,
    ) -> None:
        self.asked = ""
        self.doing = "stopping"
        self.grace = 30.0
        self.reserve = 1.0
        self.last_words: Callable[[], QcoreError] = _interrupted
        self._say, self._leave, self._output, self._ends = say, leave, output, ends
        self._save = False
        self._mode = _NEVER
        self._depth = 0
        self._before: dict[int, object] = {}
        self._overdue = False  # the rest of `grace` is needed for a checkpoint
        self._asked_at = self._seen_at = self._deadline = math.inf
        self._had_terminal = False
        self._wakeup: tuple[int, int] = (-1, -1)
        self._fd_before = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        self._depth += 1
        # Python allows handlers in the main thread only.
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            self._had_terminal = terminal_answers()
            reader, writer = self._wakeup = os.pipe()
            os.set_blocking(writer, False)
            self._fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            for number in (*_STOPS, _SAVE):
                if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
            self._thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth or self._thread is None:
            return
        os.write(self._wakeup[1], b"\0")
        self._thread.join()
        self._thread = None
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._ends else handler)  # type: ignore[arg-type]
        self._before.clear()
        signal.set_wakeup_fd(self._fd_before)
        for fd in self._wakeup:
            os.close(fd)

    @contextmanager
    def abandoning(self, *, late: bool = False) -> Iterator[None]:
        """Raise `StopNow` in this block once the run is asked to stop.

        Args:
            late: only when the rest of `grace` is needed for a checkpoint.

        Raises:
            StopNow: also at once, if the run was asked to stop before.
        """
        before, self._mode = self._mode, _LATE if late else _NOW
        try:
            self._raise_if_due()
            yield
        finally:
            self._mode = before

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Raise no `StopNow` in this block of an `abandoning` one.

        Raises:
            StopNow: after the block, if the run was asked to stop in it.
        """
        before, self._mode = self._mode, _NEVER
        try:
            yield
        finally:
            self._mode = before
        self._raise_if_due()

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals, in the main thread."""
        if number == _SAVE or (number == signal.SIGHUP and self._hung_up()):
            self._save = True
            return
        again = number == signal.SIGINT and time.monotonic() - self._asked_at > _ONE_PRESS
        if again and self._leave is None:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = signal.Signals(number).name
            self._asked_at = min(self._asked_at, time.monotonic())
        self._raise_if_due()

    def _raise_if_due(self) -> None:
        if self.asked and (self._mode == _NOW or (self._mode == _LATE and self._overdue)):
            self._mode = _NEVER
            raise StopNow

    def _hung_up(self) -> bool:
        """Whether the terminal that the run was started in is gone: that is its log, not the run.

        Elsewhere SIGHUP was sent to stop the run.
        """
        return hung_up(self._had_terminal)

    # What follows runs in the thread.

    def _watch(self, reader: int) -> None:
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        if self._output >= 0:
            poll.register(self._output, 0)  # that the reader left is always reported
        while True:
            left = self._deadline - time.monotonic()
            ready = poll.poll(None if math.isinf(left) else max(0.0, left) * 1000)
            if not ready:
                self._deadline = math.inf
                self._overdue = True
                _interrupt_main()
            for fd, _ in ready:
                if fd == self._output:
                    poll.unregister(fd)
                    self.asked = self.asked or "a closed standard output"
                    self._first(self.asked)
                    _interrupt_main()
                    continue
                for number in os.read(fd, 256):
                    if not number:
                        return
                    self._received(number)

    def _received(self, number: int) -> None:
        if number not in self._before:  # a signal that the caller of a library run handles
            return
        if number == _SAVE:
            self._show("SIGUSR1: a checkpoint will be written, and the run goes on")
        elif number == signal.SIGHUP and self._hung_up():
            return
        elif number == signal.SIGINT and time.monotonic() - self._seen_at > _ONE_PRESS:
            self._end()
        else:
            self._first(signal.Signals(number).name)

    def _first(self, name: str) -> None:
        """Say what the first signal leads to, and set the time at which a step is abandoned."""
        if not math.isinf(self._seen_at):
            return
        self._seen_at = time.monotonic()
        self._deadline = self._seen_at + max(0.0, self.grace - self.reserve)
        again = "; press Ctrl-C again to end at once" if self._leave is not None else ""
        self._show(f"{name}: {self.doing}{again}")

    def _show(self, line: str) -> None:
        if self._say is not None:
            with suppress(OSError):
                self._say(line)

    def _end(self) -> None:
        """End the process without cleaning up, as SIGKILL would: what is complete stays."""
        if self._leave is None:  # the handler raises
            return
        error: QcoreError = _interrupted()
        try:
            error = self.last_words()
            self._leave(error)
        finally:
            os._exit(error.exit_code)


def _interrupted() -> QcoreError:
    return Interrupted("QC-TRAIN-006", "ended by a second Ctrl-C", fix="run the same command again")


def _interrupt_main() -> None:
    """Make the main thread run the handler, also where it waits in a system call."""
    number = threading.main_thread().ident
    assert number is not None
    signal.pthread_kill(number, signal.SIGTERM)


def hung_up(had_terminal: bool) -> bool:
    """Whether the terminal that a process had when it began is gone."""
    return had_terminal and not terminal_answers()


def terminal_answers() -> bool:
    """Whether the process has a terminal that is not hung up."""
    try:
        os.close(os.open(_TERMINAL, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True


@contextmanager
def shielded() -> Iterator[None]:
    """Start processes that signals to the whole process group do not reach, as schedulers send.

    A signal that this process receives meanwhile is handled after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*_STOPS, _SAVE))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """Ignore signals from now on: the exit status of the process is decided."""
    if threading.current_thread() is threading.main_thread():
        for number in (*_STOPS, _SAVE):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def importing() -> Iterator[None]:
    """Delay SIGINT while torch is imported, because its import swallows `KeyboardInterrupt`.

    Raises:
        KeyboardInterrupt: after the block, if SIGINT arrived during it.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt
