"""Signals of all ranks: what one of them receives, all act on after the same step.

This file decides when a signal takes effect. A process of its own acts at once, as
`io.stop_signals` says. With several ranks a signal is noted, summed with the numbers of the next
step, and then takes effect on all; only work that a rank does alone is interrupted at once
(`alone`), and the ranks agree on that at its end (`parallel.agreement`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from ..io.stop_signals import StopSignals
from ..parallel.world import World


class SharedSignals:
    """The signals of a run.

    Args:
        stop: the signals of this process.
        world: the ranks.

    Attributes:
        stop: the signals of this process.
    """

    def __init__(self, stop: StopSignals, world: World) -> None:
        self.stop = stop
        self._world, self._alone = world, world.size == 1
        self._stop = self._save = False

    @property
    def asked(self) -> bool:
        """Whether the run was asked to stop; the same on all ranks."""
        return bool(self.stop.asked) if self._alone else self._stop

    def cause(self) -> str:
        """What asked the first of the ranks to stop that were asked; every rank must call it."""
        return next(filter(None, self._world.gather(self.stop.asked)), "another rank")

    def take_save(self) -> bool:
        """Whether a checkpoint was asked for since the last call; the same on all ranks."""
        if self._alone:
            return self.stop.take_save()
        asked, self._save = self._save, False
        return asked

    def noted(self) -> tuple[bool, bool]:
        """Whether this process was asked to stop, and for a checkpoint; to be summed over ranks."""
        return bool(self.stop.asked), self.stop.take_save()

    def agree(self, stop: bool, save: bool) -> None:
        """Take over what any rank has noted."""
        self._stop |= stop
        self._save |= save

    def abandoning(self) -> AbstractContextManager[None]:
        """A block in which a process of its own is interrupted by `StopNow`."""
        return self.stop.abandoning() if self._alone else nullcontext()

    def alone(self) -> AbstractContextManager[None]:
        """A part of such a block without collectives, in which a rank is interrupted."""
        return nullcontext() if self._alone else self.stop.abandoning()
