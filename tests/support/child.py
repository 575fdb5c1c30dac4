"""Runs a function in a forked process: a test of gigabytes leaves its worker as small as before.

Peak memory of a worker is bounded (see conftest), and a process never gives its peak back. Threads
do not survive a fork: the tests run with one thread for sums (``OMP_NUM_THREADS=1``).
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def in_child(function: Callable[P, object]) -> Callable[P, None]:
    """Call a function in a child process; what it raises fails the caller with its traceback."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                function(*args, **kwargs)
                status = 0
            except BaseException:  # noqa: BLE001, the parent raises it again
                os.write(writer, traceback.format_exc()[-60_000:].encode())
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8") as stream:
            text = stream.read()
        _, ended = os.waitpid(child, 0)
        assert ended == 0, text or f"the process ended with status {ended}"

    return run
