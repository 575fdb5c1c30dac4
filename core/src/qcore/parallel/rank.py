"""A process that is one of several ranks: its name, and the files its launcher reads.

This file decides how a process recognizes that ``torchrun`` started it, and what it notes for a
launcher: that it handles signals, that it saves, that it has finished. It imports no torch. Who
reports an error of a rank is up to `handover`.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .failure import Failure, read

#: Set by ``qcore train --gpus`` in the ranks that it starts.
LAUNCHED: Final = "QCORE_LAUNCHED"
#: File beside the error file, with the id of the process once it handles signals.
PID: Final = "pid"
#: The same, while the process writes what must be complete.
SAVING: Final = "saving"
#: File in the folder of all ranks: the launcher passes on a signal that ends the run.
ASKED: Final = "asked"
_POLL: Final = 0.02


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of this process among the ranks.

    Attributes:
        rank: its number.
        size: how many ranks there are.
        local: its number on this machine.
        file: for its record; ``None``: torchrun names none.
        launched: by ``qcore train --gpus``, which speaks for the ranks.
    """

    rank: int
    size: int
    local: int
    file: Path | None
    launched: bool

    def name(self) -> str:
        """``rank 1 (host, GPU 1)``; without a GPU where the process uses none."""
        torch = sys.modules.get("torch")
        gpu = f", GPU {self.local}" if torch and torch.cuda.is_initialized() else ""
        return f"rank {self.rank} ({socket.gethostname()}{gpu})"

    def siblings(self) -> list[Failure]:
        """The records of all ranks on this machine."""
        if self.file is None:
            return []
        files = sorted(self.file.parent.parent.glob(f"*/{self.file.name}"))
        return [failure for file in files if (failure := read(file)) is not None]

    def asked_to_stop(self, patience: float) -> bool:
        """Whether SIGTERM is a user's: without a launcher it always is taken for one.

        torchrun itself sends it to the ranks that remain when one has failed.

        Args:
            patience: seconds in which the launcher may note it.
        """
        if self.file is None or not self.launched:
            return True
        until = time.monotonic() + patience
        mark = self.file.parent.parent / ASKED
        while not mark.exists() and time.monotonic() < until:
            time.sleep(_POLL)
        return mark.exists()


def seat() -> Seat | None:
    """The place of this process; ``None`` if torchrun did not start it, or as the only rank."""
    told = os.environ
    if "TORCHELASTIC_RUN_ID" not in told or told.get("WORLD_SIZE", "1") == "1":
        return None
    try:
        rank, size, local = (int(told[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError):
        return None
    file = told.get("TORCHELASTIC_ERROR_FILE")
    return Seat(rank, size, local, Path(file) if file else None, LAUNCHED in told)


def register() -> None:
    """Note that this process handles signals, for a launcher that passes them on."""
    own = seat()
    if own is not None and own.launched and own.file is not None:
        new = own.file.with_name(f".{PID}")
        new.write_text(str(os.getpid()))
        os.replace(new, own.file.with_name(PID))


def finished() -> None:
    """Note that this process ends well: its launcher does not miss it."""
    own = seat()
    if own is not None and own.launched and own.file is not None:
        own.file.with_name(PID).unlink(missing_ok=True)


@contextmanager
def saving() -> Iterator[None]:
    """A block that the launcher lets end, though another rank has failed."""
    own = seat()
    mark = None if own is None or not own.launched or own.file is None else own.file
    if mark is None:
        yield
        return
    mark = mark.with_name(SAVING)
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)
