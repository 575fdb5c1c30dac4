"""SIGINT and SIGTERM: the first asks a run to stop after its step, the second ends it.

`importing` holds SIGINT back while a heavy module is imported.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_WATCHED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, notes the first signal instead of dying of it.

    Attributes:
        asked: name of the signal that came, or ``""``.
    """

    def __init__(self) -> None:
        self.asked = ""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        # Python delivers signals to the main thread only; elsewhere the caller handles them.
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
    """Hold SIGINT back while torch is imported, because its import swallows KeyboardInterrupt.

    Raises:
        KeyboardInterrupt: after the block, if the signal came meanwhile.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
