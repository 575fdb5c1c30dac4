"""What the host has for inputs that layers park in its pinned memory, and what that takes.

This file decides how pinned memory is counted: torch's allocator of it rounds every block up to
a power of two and gives none back. And it decides what is there: what the system says that it
can give without swapping, within the limit of a container. It imports no torch.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def pinned(size: int, count: int) -> int:
    """Bytes that `count` blocks of `size` bytes take."""
    return count * (1 << (size - 1).bit_length()) if size and count else 0


def most_pinned(room: int, count: int) -> int:
    """Bytes of a block of which `count` fit in `room`; 0: none."""
    each = room // count
    return 1 << (each.bit_length() - 1) if each else 0


def available(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Bytes that the host can give now; ``None`` where the system does not say.

    Args:
        meminfo: Linux's table of memory.
        cgroup: where the limit of this process's container stands (version 2).
    """
    found = None
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) * 1024
    with suppress(OSError, ValueError):  # no number: no limit
        most = int((cgroup / "memory.max").read_text())
        free = max(0, most - int((cgroup / "memory.current").read_text()))
        return free if found is None else min(found, free)
    return found
