"""Make the n-th call that changes the disk fail, or kill the process at it.

calls = count(job)
for n in range(calls):
    with Faults(at=n, action=errno.ENOSPC): job()
killed(job, at=n)          # in a forked child
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import Any, Self

KILL = -1
TORN = -2  # write half of the bytes, then die
MUTATING = (
    "open", "write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "ftruncate",
)  # fmt: skip


class Faults:
    """Counts mutating ``os`` calls while active; call number ``at`` meets ``action``.

    ``action`` is an errno, `KILL` or `TORN`; with ``onwards`` every later call fails too, as on
    a disk that is gone. ``log`` holds (name, arguments) of the calls that went through.
    """

    def __init__(self, at: int | None = None, action: int = 0, *, onwards: bool = False) -> None:
        self.at, self.action, self.onwards = at, action, onwards
        self.calls = 0
        self.log: list[tuple[str, tuple[Any, ...], Any]] = []
        self._real = {name: getattr(os, name) for name in MUTATING}

    def __enter__(self) -> Self:
        for name in MUTATING:
            setattr(os, name, self._wrap(name))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, real in self._real.items():
            setattr(os, name, real)

    def _wrap(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "write" and not stat.S_ISREG(os.fstat(args[0]).st_mode):
                return real(*args, **kwargs)  # to a pipe: no disk takes part
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                result = real(*args, **kwargs)
                self.log.append((name, args, result))
                return result
            n, self.calls = self.calls, self.calls + 1
            if self.at is not None and (n == self.at or (self.onwards and n > self.at)):
                if self.action == TORN and name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                if self.action < 0:
                    os._exit(9)
                raise OSError(self.action, os.strerror(self.action))
            result = real(*args, **kwargs)
            self.log.append((name, args, result))
            return result

        return call


def count(job: Callable[[], object]) -> int:
    """How many mutating calls the job makes."""
    with Faults() as faults:
        job()
    return faults.calls


def killed(job: Callable[[], object], at: int, action: int = KILL) -> bool:
    """Run the job in a forked child that dies at call ``at``; whether it died."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with Faults(at, action):
                job()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9
