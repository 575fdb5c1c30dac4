"""Checkpoints of a run folder by step, and which of them are deleted (``save_total_limit``).

A finite checkpoint may still lead to a loss that is not finite. So the checkpoint before the newest
one is kept until a step after the newest has run, whatever the limit.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..io.atomic import remove_tree
from .resume import step_of


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first."""
    steps = []
    for path in folder.iterdir() if folder.is_dir() else ():
        step = step_of(path)
        if step is not None and path.is_dir():
            steps.append((step, path))
    return sorted(steps)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The checkpoint after a step."""
    return folder / f"checkpoint-{step}"


def rotate(folder: Path, step: int, limit: int, keep: Collection[int]) -> None:
    """Delete checkpoints beyond `limit`, after that of `step` was published.

    Checkpoints of later steps were left by the run that was resumed from an earlier one; they
    belong to steps that are computed again, and are deleted first.

    Args:
        folder: the run folder.
        step: of the newest checkpoint.
        limit: ``save_total_limit``.
        keep: steps of checkpoints that are kept beyond the limit.
    """
    there = checkpoints(folder)
    later = [old for old in there if old[0] > step]
    earlier = [old for old in there if old[0] <= step]
    for number, path in [*later, *earlier[:-limit]]:
        if number not in keep:
            remove_tree(path)
