"""Will the files of a run fit on the disk: asked once, before a weight is read.

This file decides how many bytes the run folder and the adapter take at most at one moment, and that
a run which would fill the disk does not start. Tokens of rows and pixels of media are in their
caches by then, so free space no longer counts what they took. Logs are not counted, nor what other
programs write.

Code: ``QC-WRITE-007`` too little free space.
"""

from __future__ import annotations

import os
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from ..checkpoint.hub import TOKENIZER_FILES
from ..config.settings import Settings
from ..data.sampler import Schedule
from ..errors import WriteError
from ..io.artifact import check_target
from ..planning.compare import RunPlan
from .run import Run
from .spikes import LEAST


def check_space(run: Run, plan: RunPlan) -> None:
    """Refuse a run whose checkpoints and adapter do not fit on the disk of its output.

    Args:
        run: the run; what its folder holds already is not needed again.
        plan: of its memory, which has the sizes of adapter and optimizer.

    Raises:
        WriteError: ``QC-WRITE-007``.
    """
    memory = plan.worst.memory
    adapter, state = memory["adapters"], memory["adapters"] + memory["optimizer"]
    steps = Schedule(run.data.train_sizes, run.settings, run.data.train.lengths).total
    kept = most_checkpoints(run.settings, steps)
    need = kept * state + adapter + _tokenizer_bytes(run)
    # One checkpoint and the adapter are written in any case.
    need = max(need - _size(run.folder), state + adapter)
    try:
        check_target(run.target, need_bytes=need)
    except WriteError as error:
        if error.code != "QC-WRITE-007":
            return  # the output is looked at again once the lock is held
        each = f"{kept} checkpoint{'s' if kept > 1 else ''} of {state / 1e9:.2f} GB at once"
        fix = f"free space, lower save_total_limit ({each}), or name another disk"
        raise error.replace(fix=fix) from None


def most_checkpoints(settings: Settings, steps: int) -> int:
    """The most checkpoints at one moment: an old one goes only when a new one is durable.

    Args:
        settings: of the run.
        steps: optimizer steps of the run.
    """
    due = (steps - 1) // settings.save_steps if settings.save_steps else 0
    # Kept beyond the limit (`rollback.pinned`): that before a spike, that to return to, the best.
    spike = int(steps > LEAST)
    pinned = spike + spike * (settings.on_spike == "rollback")
    best = int(settings.load_best_at_end)
    return min(settings.save_total_limit + pinned, due) + best + 1


def _tokenizer_bytes(run: Run) -> int:
    """Bytes of the tokenizer files that are copied into the adapter folder."""
    checkpoint = run.model.checkpoint
    names = [n for n in checkpoint.sidecars if any(fnmatch(n, each) for each in TOKENIZER_FILES)]
    return sum(checkpoint.file(name).stat().st_size for name in names)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; 0 for one that does not exist."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                size += os.lstat(os.path.join(parent, name)).st_size
    return size
