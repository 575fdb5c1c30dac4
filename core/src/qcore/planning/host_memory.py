"""Host memory for activation offload: how much is available, and how much pinning takes.

This file decides how pinned memory is counted (torch's allocator rounds every block up to a power
of two and never returns it), and what is available: the memory that the system can provide without
swapping, within the limit of a container. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def pinned(size: int, count: int) -> int:
    """Return the bytes that `count` pinned blocks of `size` bytes take."""
    return count * (1 << (size - 1).bit_length()) if size and count else 0


def most_pinned(room: int, count: int) -> int:
    """Return the largest block in bytes of which `count` fit in `room` bytes; 0 for none."""
    each = room // count
    return 1 << (each.bit_length() - 1) if each else 0


def available(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP, own: Path = _OWN) -> int | None:
    """Return the bytes of host memory available now; ``None`` if the system does not report it.

    Args:
        meminfo: the system's memory table.
        cgroup: root of the control groups (version 2), which limit containers.
        own: file that names the control group of this process; limits of its parents apply too.
    """
    free = None
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limits = [_left(group) for group in _groups(cgroup, own)]
    return min((size for size in (free, *limits) if size is not None), default=None)


def _groups(cgroup: Path, own: Path) -> Iterator[Path]:
    """Yield the control group of this process and all of its parents."""
    path = "/"
    with suppress(OSError, ValueError):
        path = next(x[3:] for x in own.read_text().splitlines() if x.startswith("0::"))
    inner = cgroup / path.strip("/")
    yield from (group for group in (inner, *inner.parents) if group.is_relative_to(cgroup))


def _left(group: Path) -> int | None:
    """Return the bytes up to the limit of a group; its file cache counts as free."""
    with suppress(OSError, ValueError):  # not a number: no limit
        most = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        with suppress(OSError, ValueError):
            lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            used -= sum(int(n) for name, n in lines if name in ("active_file", "inactive_file"))
        return max(0, most - max(0, used))
    return None
