"""What all ranks decide alike: errors, signals, and whether they run the same thing.

This file decides that a block which ends on one rank with an error ends on all of them with that
error (`together`), in which order ranks use a cache that the first of them fills (`turns`), and
that ranks with different inputs are refused before they compute (`check_same`). Without it the
other ranks would wait in their next collective for a rank that has ended. An exception that is not
a `QcoreError` ends its process; the others then lose the connection.

Code: ``QC-PARALLEL-003`` a rank differs from the first one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from ..errors import InputError, Interrupted, QcoreError
from ..io.stop_signals import StopNow
from .failure import packed, unpacked
from .world import World

_SHOWN: Final = 80  # characters of a value in an error
_SAME: Final = (
    "start the same command on every machine, with the same files and the same versions of all "
    "libraries and plugins"
)


@contextmanager
def together(world: World) -> Iterator[None]:
    """Run a block on every rank; where it raises on some, all raise what the first of them does.

    Every rank must enter it, also if only the first one has something to do, and waits for the
    others at its end.

    Raises:
        QcoreError: of the lowest rank that raised one.
        StopNow: a signal interrupted the block on that rank.
    """
    raised: QcoreError | StopNow | None = None
    try:
        yield
    except (QcoreError, StopNow) as error:
        if world.size == 1:
            raise
        raised = error
    if world.size > 1 and (agreed := agree(world, raised)) is not None:
        raise agreed from raised if agreed is not raised else None


def agree(world: World, raised: QcoreError | StopNow | None) -> QcoreError | StopNow | None:
    """What all ranks raise: the error of the lowest rank that has one; ``None`` if none has.

    The error of one rank names it, except that of the first rank, which acts for all.
    """
    own: dict[str, Any] | None = None
    if isinstance(raised, QcoreError):
        own = packed(raised.of_process(world.name))
    elif raised is not None:
        own = {}
    records = world.wait(own)
    failed = [rank for rank, record in enumerate(records) if record is not None]
    if not failed:
        return None
    first = failed[0]
    if first == world.rank and raised is not None and (first == 0 or isinstance(raised, StopNow)):
        return raised
    chosen = records[first]
    if not chosen:
        return StopNow()
    error = unpacked(chosen)
    return error if first and not isinstance(error, Interrupted) else error.of_process("")


def turns(world: World) -> Iterator[bool]:
    """Whether it is this rank's turn: first rank 0, then one rank of each other machine, then all.

    Every rank goes through all turns, with a `together` in each.
    """
    own = 0 if world.first else 1 if world.local_rank == 0 else 2
    for turn in sorted(set(world.gather(own))):
        yield turn == own


def check_same(world: World, fields: Mapping[str, Any], fix: str = _SAME) -> None:
    """Refuse a rank whose fields differ from those of the first rank.

    Args:
        world: the ranks.
        fields: JSON by name, causes before effects.
        fix: of the error.

    Raises:
        InputError: ``QC-PARALLEL-003`` naming the first field of the first rank that differs.
    """
    first, *others = world.gather(dict(fields))
    for rank, own in enumerate(others, 1):
        for name in dict.fromkeys((*first, *own)):
            if (found := own.get(name)) != (expected := first.get(name)):
                raise InputError(
                    "QC-PARALLEL-003",
                    f"rank {rank} differs from rank 0",
                    field=name,
                    found=_short(found),
                    expected=_short(expected),
                    fix=fix,
                )


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
