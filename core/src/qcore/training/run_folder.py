"""The run folder, ``OUTPUT.run``: which run may use it, and which checkpoint it resumes from.

This file decides that one run at a time uses the folder, that a run looks at its output and at the
folder again once it has the lock (another run may have ended while this one was prepared), that
what killed runs left there and beside the output is deleted then, and that the folder is removed at
the end of a run that leaves no checkpoint. `checkpoints` decides what a checkpoint holds.

Codes: ``QC-RESUME-001`` nothing to resume, ``-003`` an unfinished run is there, ``-004`` all
checkpoints are damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..data.dataset import Dataset
from ..data.rejects import REJECTED
from ..errors import InputError, UsageError, WriteError
from ..io.artifact import check_target, verify
from ..io.atomic import drop_folders, remove_tree, writing
from ..io.leftovers import sweep, sweep_inside
from ..io.run_lock import Lock
from .media_manifest import note_media
from .resume import refuse_finished, refuse_renamed
from .rotation import checkpoints


def newest(folder: Path) -> tuple[tuple[int, Path] | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each damaged one passed over.

    Raises:
        InputError: ``QC-RESUME-004`` when there are checkpoints and all are damaged: starting
            again would throw away what may still be mended; ``-007`` the newest one has the name
            of another step.
    """
    damaged: list[str] = []
    for step, path in reversed(checkpoints(folder)):
        report = verify(path)
        if report.ok:
            refuse_renamed(path, report.meta)
            return (step, path), damaged
        damaged.append(f"{path.name} is damaged and passed over: {report.problems[0]}")
    if damaged:
        raise InputError(
            "QC-RESUME-004",
            "holds no checkpoint that can be resumed from",
            file=folder,
            found=damaged[0],
            fix="restore one, or delete the folder to start again",
        )
    return None, []


def run_folder(output: Path, *, resume: bool) -> Path:
    """Where a run that writes `output` keeps its checkpoints and metrics.

    Raises:
        UsageError: ``QC-RESUME-001`` nothing to resume, ``-003`` an unfinished run is there.
        WriteError: ``QC-WRITE-010`` that run is going on.
    """
    folder = output.with_name(output.name + ".run")
    if resume and not folder.is_dir():
        raise UsageError(
            "QC-RESUME-001",
            "there is no run to resume",
            file=folder,
            field="--resume",
            fix="drop --resume, or name the --output of the run that was stopped",
        )
    if not resume and checkpoints(folder):
        with Lock(folder):  # the fix below deletes the folder, which must not be in use
            pass
        raise _of_another_run(folder)
    return folder


def _of_another_run(folder: Path) -> UsageError:
    return UsageError(
        "QC-RESUME-003",
        "holds the checkpoints of another run",
        file=folder,
        fix="pass --resume to go on with it, or delete the folder to start again",
    )


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Lock the run folder and delete what killed runs left in it and beside it.

    It is removed afterwards unless it holds a checkpoint. An error inside the block is never
    replaced by one of the removal: on a full disk, the file that failed first is named.

    Args:
        folder: the run folder; it need not exist.

    Raises:
        WriteError: ``QC-WRITE-010`` another run has the lock; ``-003`` to ``-006``.
    """
    # Outside the try: where another run holds the lock, its folder is not removed.
    with Lock(folder, create=True) as lock:
        try:
            sweep(folder)
            sweep_inside(folder)
            yield folder
        except BaseException:
            with suppress(WriteError):
                _remove_if_empty(folder, lock.created)
            raise
        _remove_if_empty(folder, lock.created)


def _remove_if_empty(folder: Path, created: list[Path]) -> None:
    if not checkpoints(folder):
        remove_tree(folder)
        drop_folders(created[:-1])


def check_again(target: Path, folder: Path, *, resume: bool) -> None:
    """Look at the output and the run folder again, with the lock of the folder.

    Between the first look and the lock another run may have published the output, or may have been
    stopped and left checkpoints; all steps would be computed before that is noticed.

    Args:
        target: the output.
        folder: the run folder, locked.
        resume: continue the run that was stopped.

    Raises:
        UsageError: ``QC-RESUME-003`` or ``-005``.
        WriteError: as `check_target`.
    """
    if resume:
        refuse_finished(target)
    elif checkpoints(folder):
        raise _of_another_run(folder)
    check_target(target)
    sweep(target)


def note_rows(folder: Path, rows: Dataset, *, resume: bool) -> None:
    """Write which media the rows have and which rows were refused.

    Args:
        folder: the run folder.
        rows: of the run.
        resume: the run is continued.

    Raises:
        WriteError: ``QC-WRITE-003`` to ``-006``.
    """
    note_media(folder, rows, resume=resume)
    with writing(folder / REJECTED):
        rows.rejects.write(folder / REJECTED)
