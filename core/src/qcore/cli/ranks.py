"""``qcore train`` as several processes: starts them, or takes the place of one of them.

This file decides which process of several prints, and that ``--gpus`` is ignored in the ranks that
it has started. How ranks are started and how they fail is up to `qcore.parallel`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from ..io.stop_signals import StopSignals
from .common import debugging
from .output import leave_now, say_now


def launches(gpus: int | None) -> bool:
    """Whether ``--gpus`` asks this process to start others, or to join other machines."""
    from ..parallel.rank import seat

    own = seat()
    alone = gpus == 1 and os.environ.get("PET_NNODES", "1") == "1"
    return gpus is not None and not alone and not (own is not None and own.launched)


def launch(gpus: int, device: str, *, restarts: bool, as_json: bool) -> int:
    """Run this command line as several ranks; returns the exit status.

    Args:
        gpus: how many.
        device: ``auto``, ``cpu`` or ``cuda``.
        restarts: torchrun may start them again after a failure.
        as_json: print errors as JSON.

    Raises:
        QcoreError: as `qcore.parallel.launch.launch`.
    """
    from ..parallel.launch import launch

    words, leave = sys.argv[1:], partial(leave_now, as_json=as_json)
    return launch(
        gpus, words, device=device, restarts=restarts, leave=leave, debug=debugging(words)
    )


def prints() -> bool:
    """Whether this process prints the result: it is the only one, or the first rank."""
    from ..parallel.rank import seat

    own = seat()
    return own is None or own.rank == 0


@contextmanager
def signals(*, as_json: bool) -> Iterator[StopSignals]:
    """Handle signals in this process, which may be one of several ranks, until it ends well."""
    from ..parallel import handover, rank

    leave = partial(leave_now, as_json=as_json)
    stop = StopSignals(
        say=handover.quiet_in_failure(say_now), leave=handover.last_words(leave),
        output=1 if as_json and prints() else -1, ends=True,
    )  # fmt: skip
    with stop:
        handover.spoken_by(leave)
        rank.register()
        yield stop
        rank.finished()
