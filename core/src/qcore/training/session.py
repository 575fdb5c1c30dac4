"""A run whose base is loaded, and what is restored of the run that was stopped.

This file decides what a resumed run takes from its newest checkpoint: tensors, moments, the best
evaluation and the state of the guard. Which checkpoint that is, is up to `run_folder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..planning.compare import RunPlan
from ..planning.oom import Watch
from .best import BestSoFar
from .checkpoints import RunFiles, check_best
from .rotation import checkpoint_path
from .run import Run
from .run_folder import newest
from .shared_signals import SharedSignals
from .step import Loop
from .stopping import Saver


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A run whose base is loaded; `start` is B of the initial adapter."""

    run: Run
    plan: RunPlan
    files: RunFiles
    loop: Loop
    signals: SharedSignals
    watch: Watch
    best: BestSoFar
    start: Mapping[str, Tensor] | None
    saver: Saver

    def at(self, where: str, then: str = "then writing a checkpoint and ending") -> None:
        """Note where the run is, and what a signal would lead to."""
        self.watch.at(where)
        self.signals.stop.doing = f"finishing {where}, {then}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the steps led to.

    Attributes:
        first_loss: of step 1.
        last_loss: of the last step.
        eval_loss: at the end.
        moved: how many adapted linear maps changed, and of how many.
        published: the best checkpoint, where it is published in place of the last step.
    """

    first_loss: float
    last_loss: float
    eval_loss: float | None
    moved: tuple[int, int]
    published: Path | None


def restore(session: Session) -> Mapping[str, Any] | None:
    """Restore the newest checkpoint.

    Returns:
        The metrics of its step, if the evaluation that follows it is still to be done.
    """
    run, loop = session.run, session.loop
    last, damaged = newest(run.folder)
    run.reporter.lines(damaged)
    if last is None:
        run.reporter.note("no checkpoint was written before the run stopped: starting at step 1")
        return None
    step, path = last
    meta = session.files.restore(path, loop.optimizer)
    session.best.restore(meta)
    loop.guard.restore(meta.get("spike_guard"))
    loop.guard.newest = session.saver.last = step
    if run.settings.load_best_at_end and session.best.best is not None:
        check_best(checkpoint_path(run.folder, session.best.best.step))
    run.reporter.note(f"resuming after step {step} of {loop.schedule.total}")
    pending: Mapping[str, Any] | None = meta.get("pending")
    return pending
