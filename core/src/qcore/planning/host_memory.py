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
    """Bytes that `count` blocks of `size` bytes take."""
    return count * (1 << (size - 1).bit_length()) if size and count else 0


def most_pinned(room: int, count: int) -> int:
    """Bytes of a block of which `count` fit in `room`; 0: none."""
    each = room // count
    return 1 << (each.bit_length() - 1) if each else 0


def available(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP, own: Path = _OWN) -> int | None:
    """Bytes that the host can give now; ``None`` where the system does not say.

    Args:
        meminfo: Linux's table of memory.
        cgroup: where the limits of groups of processes stand (version 2).
        own: which group this process is in; a limit of any group above it holds too.
    """
    found = None
    with suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) * 1024
    limits = [_left(group) for group in _groups(cgroup, own)]
    return min((size for size in (found, *limits) if size is not None), default=None)


def _groups(cgroup: Path, own: Path) -> Iterator[Path]:
    """The group that this process is in, and all above it."""
    below = "/"
    with suppress(OSError, ValueError):
        below = next(x[3:] for x in own.read_text().splitlines() if x.startswith("0::"))
    inner = cgroup / below.strip("/")
    yield from (one for one in (inner, *inner.parents) if one.is_relative_to(cgroup))


def _left(group: Path) -> int | None:
    """Bytes up to the limit of a group; its cache of files is given up when memory is asked for."""
    with suppress(OSError, ValueError):  # no number: no limit
        most = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        with suppress(OSError, ValueError):
            lines = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            used -= sum(int(n) for name, n in lines if name in ("active_file", "inactive_file"))
        return max(0, most - max(0, used))
    return None
