"""How many processor cores this process may use.

This file decides it from the process's affinity and the quota of its control group, because a
container on a large host often has a share of its cores.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Final

_GROUPS: Final = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, quota(_GROUPS))))


def quota(groups: Path) -> float:
    """Cores' worth of processor time that the control group may use; infinite without a limit.

    Args:
        groups: where control groups are mounted, of version 1 or 2.
    """
    limit = _numbers(groups / "cpu.max")
    if len(limit) != 2:
        one = groups / "cpu"
        limit = [*_numbers(one / "cpu.cfs_quota_us"), *_numbers(one / "cpu.cfs_period_us")]
    if len(limit) != 2 or min(limit) <= 0:
        return math.inf
    return limit[0] / limit[1]


def _numbers(path: Path) -> list[int]:
    """The numbers in a file; words such as ``max`` are left out."""
    try:
        words = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return []
    return [int(word) for word in words if word.lstrip("-").isdigit()]
