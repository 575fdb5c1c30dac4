"""Writes the checkpoints of a run, and ends a run that a signal or a guard asks to stop.

This file decides what is saved before a run ends, which checkpoints stay, what the user reads, and
that the command it names works. Which signals there are and when one interrupts is up to
`io.stop_signals`; what a checkpoint holds, to `checkpoints`; what a spike or a gain is, to `spikes`
and `verdict`.

Codes: ``QC-TRAIN-006`` a signal stopped the run, ``-018`` the run gained nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from ..errors import Interrupted, WriteError
from ..io.artifact import MANIFEST
from ..io.atomic import remove_tree
from ..io.stop_signals import StopNow, StopSignals
from ..parallel.agreement import together
from ..reporting import CheckpointSaved
from .best import BestSoFar
from .checkpoints import METRICS, RunFiles
from .rollback import after_spike, pinned
from .rotation import checkpoint_path, checkpoints, rotate
from .run import Run
from .step import Loop
from .verdict import loss_without_gain, not_published, too_small

AGAIN: Final = "run the same command again"
WITH_RESUME: Final = "run the same command with --resume"
#: Bytes a second at which the first checkpoint is expected to be written.
_SLOW_DISK: Final = 100e6


@contextmanager
def before_steps(stop: StopSignals, what: str) -> Iterator[None]:
    """Let a signal end the block at once: no step is lost.

    Args:
        stop: the signals.
        what: what the block does, for the error: ``the base was loading``.

    Raises:
        Interrupted: ``QC-TRAIN-006``.
    """
    stop.doing = "ending; no step was taken since this command started"
    try:
        with stop.abandoning():
            yield
    except StopNow:
        why = f"stopped by {stop.asked or 'a signal to another rank'} while {what}"
        raise Interrupted("QC-TRAIN-006", why, fix=AGAIN) from None


def last_words(run: Run, fix: str) -> Callable[[], Interrupted]:
    """What is true where a second Ctrl-C ends the process.

    Args:
        run: the run.
        fix: how the user goes on from a checkpoint.
    """

    def words() -> Interrupted:
        what = "ended by a second Ctrl-C"
        if (run.target / MANIFEST).is_file():
            return Interrupted(
                "QC-TRAIN-006", f"{what} after the adapter was published", file=run.target
            )
        saved = checkpoints(run.folder)
        if not saved:
            return Interrupted("QC-TRAIN-006", f"{what} before the first checkpoint", fix=AGAIN)
        step, path = saved[-1]
        return Interrupted(
            "QC-TRAIN-006", f"{what}; the steps after step {step} are lost", file=path, fix=fix
        )

    return words


class Saver:
    """Writes the checkpoints of one run, and what a signal may interrupt in it.

    Args:
        run: the run.
        files: writes a checkpoint.
        loop: takes the steps.
        stop: the signals.
        best: the best evaluation so far.
        fix: how the user goes on from a checkpoint.

    Attributes:
        last: steps that the newest checkpoint holds; 0 without one.
    """

    def __init__(
        self,
        run: Run,
        files: RunFiles,
        loop: Loop,
        stop: StopSignals,
        best: BestSoFar,
        fix: str,
    ) -> None:
        self.last = 0
        self._unsaved: WriteError | None = None  # of the checkpoint after the last step
        self._unproven = False
        self._run, self._files, self._loop = run, files, loop
        self._stop, self._best, self._fix = stop, best, fix
        self._world, self._signals = run.world, loop.signals
        trained = sum(p.numel() for _, p in files.model.trainable())
        stop.reserve = 1.0 + 3 * 4 * trained / _SLOW_DISK  # a weight has two moments

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block of all ranks in which the first one may write; see `parallel.agreement`.

        Raises:
            QcoreError: of the block, or of what a rank did before it.
        """
        with together(self._world):
            if self._loop.failure is not None:
                raise self._loop.failure
        with together(self._world):
            yield

    def save(self, done: int, pending: Mapping[str, Any] | None = None) -> Path:
        """Write the checkpoint after step `done`; no signal interrupts it.

        The one before it stays until another step has had a finite loss. Every rank calls it, and
        the first one writes.

        Args:
            done: optimizer steps that are done.
            pending: the step's row of metrics, if it is evaluated afterwards.
        """
        if not self._world.first:
            self.last = self._loop.guard.newest = done
            self._unproven = True
            return checkpoint_path(self._run.folder, done)
        with self._stop.finishing(), self._world.finishing():
            self._stop.doing = f"finishing the checkpoint after step {done}, then ending"
            began = time.monotonic()
            folder, loop = self._run.folder, self._loop
            earlier = [step for step, _ in checkpoints(folder) if step < done]
            path = self._files.save(
                folder, done, loop.optimizer, self._best.best, pending,
                guard=loop.guard, keep={*pinned(self._run, loop.guard, done), *earlier[-1:]},
            )  # fmt: skip
            self._stop.reserve = 1.0 + 2 * (time.monotonic() - began)
            self.last = loop.guard.newest = done
            self._unproven = True
            self._run.reporter.emit(CheckpointSaved(step=done, folder=path))
        return path

    def save_last(self) -> None:
        """Write the checkpoint after the last step, so that no fault of the end costs a step.

        It goes once the adapter is published (`publish`), so no other one makes room for it. The
        run goes on without it: the adapter is smaller and may still be written.
        """
        total, folder = self._loop.schedule.total, self._run.folder
        with self.together():
            if self.last != total and self._world.first:
                self._save_last(total, folder)
        if not self._world.first:
            self.last = total

    def _save_last(self, total: int, folder: Path) -> None:
        keep = [step for step, _ in checkpoints(folder)]
        try:
            with self._stop.finishing(), self._world.finishing():
                self._stop.doing = f"finishing the checkpoint after step {total}, then ending"
                best, loop = self._best.best, self._loop
                self._files.save(folder, total, loop.optimizer, best, guard=loop.guard, keep=keep)
        except WriteError as error:
            self._unsaved = error
            with suppress(WriteError):  # the metrics hold the warning, if they can be written
                self._run.reporter.warning(f"no checkpoint after the last step: {error.message}")
        else:
            self.last = total

    @contextmanager
    def first_fault(self) -> Iterator[None]:
        """Let an error of writing be that of the checkpoint after the last step, if that failed.

        On a full disk the file that failed first is named.
        """
        try:
            yield
        except WriteError as error:
            if self._unsaved is None:
                raise
            raise self._unsaved from error

    def publish(self, result: Mapping[str, Any], same: Path | None) -> None:
        """Publish the adapter, then delete the checkpoint after the last step.

        Args:
            result: for the manifest.
            same: checkpoint whose tensors are published.

        Raises:
            WriteError: the output was filled meanwhile or cannot be written; the fix names the
                checkpoint, if there is one.
        """
        if not self._world.first:
            return
        last = checkpoint_path(self._run.folder, self._loop.schedule.total)
        try:
            with self._world.finishing():
                self._files.publish(self._run.target, self._run.folder / METRICS, result, same)
        except WriteError as error:
            if self._unsaved is not None:
                raise
            filled = error.code == "QC-WRITE-001"
            fix = "move what is in it to another folder" if filled else error.fix
            raise error.replace(fix=f"{fix}, then {self._fix}: {last} holds all steps") from error
        with suppress(WriteError):  # it is of no use any more, and the adapter is published
            remove_tree(last)

    def take_step(self, number: int) -> dict[str, Any]:
        """The metrics of optimizer step `number`, from 0.

        A step with a spike is reported, or undone; a finite one proves the newest checkpoint.

        Raises:
            NumericError: as `Loop.step` and `after_spike`.
            Interrupted: ``QC-TRAIN-006`` the step would have outlasted ``grace_seconds``.
        """
        try:
            metrics = self._loop.step(number)
        except StopNow:
            self._loop.optimizer.zero_grad(set_to_none=True)
            where = f"in step {number + 1} of {self._loop.schedule.total}, which was abandoned"
            with self.together():
                raise self.stopped(number, where) from None
        if spike := metrics.get("spike"):
            with self.together():
                after_spike(self._files, self._loop, number + 1, spike)
        if self._unproven:
            with self.together():
                self._rotate(number)
        return metrics

    def _rotate(self, newest: int) -> None:
        """Delete checkpoints beyond the limit; `newest` is the step of the newest one."""
        self._unproven = False
        if not self._world.first:
            return
        run, best = self._run, self._best.best
        kept = {*pinned(run, self._loop.guard, newest), *(() if best is None else (best.step,))}
        rotate(run.folder, newest, run.settings.save_total_limit, kept)

    def judge(self, start: Mapping[str, Tensor] | None, published: Path | None) -> dict[str, Any]:
        """Check that the run gained something; returns what the manifest records.

        Args:
            start: B of each weight in the initial adapter; ``None``: zero.
            published: the checkpoint of the best evaluation, if it is published in place of the
                last step, whose losses then say nothing about it.

        Raises:
            NumericError: ``QC-TRAIN-018``; a checkpoint holds the adapter.
        """
        run, loop, total = self._run, self._loop, self._loop.schedule.total
        guard = loop.guard
        undone = {"undone_steps": [list(steps) for steps in guard.undone]} if guard.undone else {}
        why = too_small(loop.model, start)
        if not why and published is None:
            why = loss_without_gain(guard.first, [*guard.losses], total, len(loop.model.head))
        if not why:
            return undone
        if run.settings.publish_without_gain:
            run.reporter.warning(f"{why}; published because of publish_without_gain")
            return undone | {"without_gain": why}
        path = published or checkpoint_path(run.folder, total)
        raise not_published(why, path if path.is_dir() else self.save(total))

    def evaluate(self, done: int, metrics: Mapping[str, Any]) -> float | None:
        """The loss of the held-out rows after step `done`.

        Raises:
            Interrupted: ``QC-TRAIN-006`` a signal came; resuming begins with this evaluation.
        """
        where = f"the evaluation after step {done}"
        self._stop.doing = f"dropping {where}, then writing a checkpoint and ending"
        try:
            with self._signals.abandoning():
                return self._loop.evaluate(partial(self.if_asked, done, metrics))
        except StopNow:
            where = f"in {where} of {self._loop.schedule.total}"
            with self.together():
                raise self.stopped(done, where, metrics) from None

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Let a signal interrupt the checks and the evaluation after the last step.

        Raises:
            Interrupted: ``QC-TRAIN-006``; resuming begins with these checks.
        """
        total = self._loop.schedule.total
        self._stop.doing = "dropping the last evaluation, then writing a checkpoint and ending"
        try:
            with self._signals.abandoning():
                yield
        except StopNow:
            with self.together():
                raise self.stopped(total, f"after step {total} of {total}") from None

    def if_asked(self, done: int, pending: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint if SIGUSR1 asked for one."""
        if self._signals.take_save() and self.last != done:
            self.save(done, pending)

    def stopped(
        self, done: int, where: str, pending: Mapping[str, Any] | None = None
    ) -> Interrupted:
        """Write the checkpoint after step `done` unless it is there; returns the error.

        Args:
            done: optimizer steps that are done.
            where: ``after step 3 of 10``.
            pending: the step's row of metrics, if its evaluation was dropped.
        """
        what = f"stopped by {self._signals.cause()} {where}"
        if not done:
            return Interrupted("QC-TRAIN-006", what, fix=AGAIN)
        if self.last != done:
            self.save(done, pending)
        path = self._run.folder / f"checkpoint-{done}"
        return Interrupted("QC-TRAIN-006", what, file=path, fix=self._fix)
