"""``--auto-resume``: whether a run starts, continues or is finished already.

This file decides it from what is on the disk, so that a service manager or a scheduler can start
the same command again after every end. Whether it is the same run is up to `resume`; of a finished
one, whose rows are not read again, the settings that the user has named are compared.

Codes: ``QC-RESUME-010`` with ``--resume``, ``-011`` the adapter of the finished run is damaged,
``-002`` it was trained with another setting.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..adapter.targets import Coverage
from ..config.settings import Settings
from ..errors import InputError, QcoreError, UsageError, WriteError
from ..io.artifact import MANIFEST, read_manifest, verify
from ..io.atomic import sync_folder, writing
from ..io.leftovers import sweep
from ..io.run_lock import Lock
from ..reporting import Reporter
from .report import TrainReport
from .resume import HOW_MUCH, NO_NUMBERS, SAME_NUMBERS
from .rotation import checkpoints
from .run_folder import locked, newest


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a run starts.

    Attributes:
        resume: continue the run that was stopped.
        finished: the report of the run, if it has published its adapter.
    """

    resume: bool = False
    finished: TrainReport | None = None

    @property
    def kind(self) -> str:
        """What is at the output, in words."""
        if self.finished is not None:
            return "a finished run"
        return "a run to go on with" if self.resume else "no run"


def how_to_start(
    output: str | Path,
    settings: Settings,
    origins: Mapping[str, str] | None,
    reporter: Reporter,
    *,
    resume: bool,
) -> Start:
    """Look at what an earlier process has left.

    If no checkpoint of a run is intact, its folder is kept under another name and the run starts
    again: an unattended process must not end at it every time.

    Args:
        output: the adapter folder.
        settings: of this command.
        origins: source of each setting; ``None``: those that differ from their default were named.
        reporter: receives notes.
        resume: whether the user has passed ``--resume`` as well.

    Raises:
        UsageError: ``QC-RESUME-010``.
        InputError: ``QC-RESUME-011``, ``-002``.
        WriteError: ``QC-WRITE-010`` the run is in progress.
    """
    if resume:
        raise UsageError(
            "QC-RESUME-010",
            "continues a run, and --auto-resume decides whether there is one",
            field="--resume",
            fix="pass one of them",
        )
    target = Path(os.path.realpath(output))
    folder = target.with_name(target.name + ".run")
    finished = _finished(target, Path(output), settings, origins)
    if finished is not None:
        reporter.note(f"{output}: this run is finished after {finished.steps} steps")
        _tidy(target, folder)
        return Start(finished=finished)
    if not checkpoints(folder):
        return Start()
    try:
        newest(folder)
    except InputError as error:
        if error.code != "QC-RESUME-004":
            raise
        aside = _set_aside(folder)
        reporter.warning(f"{error.message}: starting again; the folder is kept as {aside}")
        return Start()
    return Start(resume=True)


def _tidy(target: Path, folder: Path) -> None:
    """Delete what a kill after the end of the run has left; no later run would."""
    sweep(target)
    sweep(folder)
    if folder.is_dir():
        with suppress(WriteError), locked(folder):  # its end removes what holds no checkpoint
            pass


def _set_aside(folder: Path) -> Path:
    """Rename a run folder that no process uses."""
    names = (folder.with_name(f"{folder.name}-damaged-{number}") for number in count(1))
    aside = next(path for path in names if not path.exists())
    with Lock(folder), writing(folder):
        os.rename(folder, aside)
        sync_folder(folder.parent)
    return aside


def _finished(
    target: Path, shown: Path, settings: Settings, origins: Mapping[str, str] | None
) -> TrainReport | None:
    """The report of the run that has published its adapter; ``None`` if none has."""
    if not (target / MANIFEST).is_file():
        return None
    try:
        meta = read_manifest(target).meta
    except QcoreError:  # not an adapter of a run: `check_target` says what it is
        return None
    if meta.get("verb") != "train":
        return None
    checked = verify(target)
    if not checked.ok:
        raise InputError(
            "QC-RESUME-011",
            "is the adapter of a finished run and is damaged",
            file=shown,
            found=checked.problems[0],
            fix="restore it, or name another --output to train again",
        )
    _compare(shown, (meta.get("identity") or {}).get("settings") or {}, settings, origins)
    return _report(shown, meta)


def _compare(
    shown: Path, before: Mapping[str, Any], settings: Settings, origins: Mapping[str, str] | None
) -> None:
    """Compare the settings that the user has named with those of the finished run.

    Raises:
        InputError: ``QC-RESUME-002``.
    """
    now = json.loads(json.dumps(settings.to_dict()))
    default = json.loads(json.dumps(Settings().to_dict()))
    free = {key.removeprefix("settings.") for key in (*SAME_NUMBERS, *HOW_MUCH)} | NO_NUMBERS
    for key, value in now.items():
        named = value != default[key] if origins is None else origins.get(key) != "default"
        if named and key not in free and key in before and before[key] != value:
            raise InputError(
                "QC-RESUME-002",
                "changed since the run finished",
                file=shown,
                field=f"settings.{key}",
                found=value,
                expected=before[key],
                fix="restore it, or start a new run with another --output",
            )


def _report(output: Path, meta: Mapping[str, Any]) -> TrainReport:
    """The report that the run gave when it finished."""
    result = meta["result"]
    losses = {
        key: math.nan if result.get(key) is None else result[key]
        for key in ("first_loss", "last_loss")
    }
    return TrainReport(
        output=output,
        steps=result["steps"],
        **losses,
        eval_loss=result["eval_loss"],
        best_evaluation=result["best_evaluation"],
        published_step=result["published_step"],
        adapter_class=meta["adapter_class"]["name"],
        coverage=tuple(Coverage(**line) for line in meta["coverage"]),
        plan=result["plan"],
        measured=result["measured"],
    )
