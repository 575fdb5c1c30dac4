"""SIGINT and SIGTERM: the first asks a run to stop after its step, the second ends it.

This file decides how signals are handled: `StopSignals` notes the first one during a run, and
`importing` delays SIGINT while torch is imported. The training loop decides when to stop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_WATCHED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """A context manager that notes the first signal instead of ending the process.

    A second signal raises `KeyboardInterrupt`.

    Attributes:
        asked: name of the first signal, or ``""``.
    """

    def __init__(self) -> None:
        self.asked = ""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        # Python allows handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in _WATCHED:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name


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
