"""When a checkpoint is written, which ones stay, and whether the adapter of a run is published.

This file joins what `checkpoints`, `step`, `rollback` and `verdict` know of a run; `train` decides
when it is called.

Code: ``QC-TRAIN-018`` the run gained nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import NumericError
from ..reporting import CheckpointSaved
from .best import Evaluated
from .checkpoints import RunFiles
from .rollback import pinned
from .rotation import checkpoint_path, checkpoints, rotate
from .step import Loop
from .verdict import loss_without_gain, too_small


def save_checkpoint(files: RunFiles, loop: Loop, best: Evaluated | None, done: int) -> Path:
    """Publish a checkpoint after `done` steps; the one before it stays until `rotate_proven`."""
    run = files.run
    earlier = [step for step, _ in checkpoints(run.folder) if step < done]
    keep = {*pinned(run, loop.guard, done), *earlier[-1:]}
    path = files.save(run.folder, done, loop.optimizer, best, guard=loop.guard, keep=keep)
    loop.guard.newest = done
    run.reporter.emit(CheckpointSaved(step=done, folder=path))
    return path


def rotate_proven(files: RunFiles, loop: Loop, best: Evaluated | None, newest: int) -> None:
    """Delete checkpoints beyond the limit, once a finite step has followed the newest one."""
    run = files.run
    kept = {*pinned(run, loop.guard, newest), *(() if best is None else (best.step,))}
    rotate(run.folder, newest, run.settings.save_total_limit, kept)


def judge(
    files: RunFiles,
    loop: Loop,
    best: Evaluated | None,
    start: Mapping[str, Tensor] | None,
    published: Path | None,
) -> dict[str, Any]:
    """Check that a run gained something; returns what the manifest records.

    Args:
        files: of the run.
        loop: after its last step.
        best: the best evaluation.
        start: B of each weight in the initial adapter; ``None``: zero.
        published: the checkpoint of the best evaluation, if it is published in place of the last
            step, whose losses then say nothing about it.

    Raises:
        NumericError: ``QC-TRAIN-018``; a checkpoint holds the adapter.
    """
    run, guard, total = files.run, loop.guard, loop.schedule.total
    undone = {"undone_steps": [list(steps) for steps in guard.undone]} if guard.undone else {}
    why = too_small(loop.model, start)
    if not why and published is None:
        losses = [*guard.losses]
        why = loss_without_gain(guard.first, losses, total, len(loop.model.head))
    if not why:
        return undone
    if run.settings.publish_without_gain:
        run.reporter.warning(f"{why}; published because of publish_without_gain")
        return undone | {"without_gain": why}
    path = published or checkpoint_path(run.folder, total)
    if not path.is_dir():
        save_checkpoint(files, loop, best, total)
    raise NumericError(
        "QC-TRAIN-018",
        f"{why}; it is not published",
        file=path,
        fix="look at the adapter in this folder and at metrics.jsonl beside it; train with another "
        "learning_rate, or publish it with --resume --set publish_without_gain=true",
    )
