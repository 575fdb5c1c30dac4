"""Builds the fault shim and writes its control file.

This file decides what a fault is and how the C library of shim.c learns of it. Where a fault is
put, `points` decides.
"""

from __future__ import annotations

import errno
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("shim.c")
_FORMAT: Final = "6l1024s1024s"  #: `struct control` of shim.c
_KILL, _TORN = -1, -2  #: its actions
_FOREVER, _WHILE_GROWING = 1, 2  #: its `onwards`


@dataclass(frozen=True, slots=True)
class Fault:
    """What one call meets.

    Attributes:
        action: an errno, or a negative number of shim.c.
        onwards: what later calls meet: 0 nothing, 1 the same, 2 the same if they need space.
    """

    action: int
    onwards: int = 0


#: The faults by their names in results.
FAULTS: Final = {
    "kill": Fault(_KILL),
    "torn": Fault(_TORN),
    "eio": Fault(errno.EIO),
    "enospc": Fault(errno.ENOSPC),
    "full": Fault(errno.ENOSPC, _WHILE_GROWING),
    "gone": Fault(errno.EIO, _FOREVER),
}


@dataclass(frozen=True, slots=True)
class Call:
    """A call that changed a file.

    Attributes:
        number: position in the run, from 1.
        name: as in the C library.
        path: the file.
        target: of a rename.
    """

    number: int
    name: str
    path: str
    target: str


class Control:
    """The control file of a run.

    Args:
        path: where it lies; `arm` writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log = path.with_suffix(".log")

    def arm(self, folder: Path, fault: Fault | None = None, at: int = 0, *, log: bool) -> None:
        """Count the calls below a folder from 1, and fail call number `at`.

        Args:
            folder: only files below it count.
            fault: what the call meets.
            at: its number.
            log: keep a list of all calls, for `calls`.
        """
        self._log.unlink(missing_ok=True)
        action, onwards = (0, 0) if fault is None else (fault.action, fault.onwards)
        watched = f"{folder.resolve()}/".encode()
        numbers = (0, at if fault else 0, action, onwards, 0, int(log))
        self.path.write_bytes(struct.pack(_FORMAT, *numbers, watched, str(self._log).encode()))

    def counted(self) -> tuple[int, int]:
        """How many calls were made, and the number of the first that failed (0: none)."""
        numbers = struct.unpack(_FORMAT, self.path.read_bytes())
        return numbers[0], numbers[4]

    def calls(self) -> list[Call]:
        """The calls of a run that was armed with `log`."""
        if not self._log.exists():
            return []
        lines = (line.split("\t") for line in self._log.read_text("utf-8").splitlines())
        return [Call(int(number), name, path, target) for number, name, path, target in lines]


def build(folder: Path) -> Path | None:
    """Compile the shim into a folder; ``None`` where the machine has no C compiler.

    Raises:
        RuntimeError: there is a compiler, and it failed.
    """
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "shim.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the fault shim does not compile: {done.stderr.strip()[:500]}")
    return library
