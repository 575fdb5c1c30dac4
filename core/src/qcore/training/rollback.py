"""What a run does after a step with a spike: it warns, or returns to a checkpoint.

``on_spike: rollback`` means: the step with the spike makes no update, and the updates since the
last checkpoint of ``save_steps`` are undone. Adapter, moments and the guard's window are again
those of the checkpoint, and the run continues with the rows and the learning rate of the next
step. So neither the rows of the spike nor those that led to it are trained again in this pass over
the data; PaLM (Chowdhery et al. 2022, section 5.1) leaves out such rows in the same way.

Only checkpoints of ``save_steps`` count, not those of a signal or of the best evaluation, so that
an interrupted run returns to the same one, which is never rotated away. A third return to the same
checkpoint stops the run.

Code: ``QC-TRAIN-017`` no checkpoint to return to, or too many returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..io.artifact import verify
from .checkpoints import RunFiles
from .rotation import checkpoint_path
from .run import Run
from .spikes import SpikeGuard
from .step import Loop
from .step_checks import spiked

_RETURNS: Final = 2  #: times that a run returns to the same checkpoint


def scheduled(run: Run, done: int) -> int | None:
    """The step of the last checkpoint of ``save_steps`` at or before a step, if any."""
    every = run.settings.save_steps
    return done // every * every or None if every else None


def pinned(run: Run, guard: SpikeGuard, done: int) -> frozenset[int]:
    """Steps of checkpoints that rotation must keep, after `done` steps.

    The last one before a spike that is not over, and with ``rollback`` the one to return to.
    """
    steps = {guard.good}
    if run.settings.on_spike == "rollback":
        steps.add(scheduled(run, done))
    return frozenset(step for step in steps if step is not None)


def after_spike(files: RunFiles, loop: Loop, done: int, spike: Mapping[str, Any]) -> None:
    """Report a spike at step `done`; undo updates if ``on_spike`` is ``rollback``.

    Raises:
        NumericError: ``QC-TRAIN-017``.
        InputError: ``QC-RESUME-002`` or ``-006``, the checkpoint is not as it was written.
    """
    run, rows = files.run, spike["rows"]
    words = (
        f"step {done}: loss z {spike['loss_z']:.1f} (median {spike['loss_median']:.4g}), gradient "
        f"norm z {spike['grad_norm_z']:.1f} (median {spike['grad_norm_median']:.4g}); {rows}"
    )
    if run.settings.on_spike != "rollback":
        good = loop.guard.good
        kept = "no checkpoint yet" if good is None else f"checkpoint-{good} is kept"
        run.reporter.warning(f"the loss or its gradient norm rose abruptly at {words}; {kept}")
        return
    path = _target(run, loop.guard, done, spike)
    meta = files.restore(path, loop.optimizer)
    step = int(meta["step"])
    loop.guard.restore(meta.get("spike_guard"))
    loop.guard.undone.append((step + 1, done))
    run.reporter.warning(
        f"the loss or its gradient norm rose abruptly at {words}; returned to {path.name}: the "
        f"updates of steps {step + 1} to {done} are undone"
    )


def _target(run: Run, guard: SpikeGuard, done: int, spike: Mapping[str, Any]) -> Path:
    """The checkpoint to return to."""
    step = scheduled(run, done - 1)
    place = (None, str(spike["rows"]))
    found = f"loss z {spike['loss_z']:.1f}, gradient norm z {spike['grad_norm_z']:.1f}"
    if step is None:
        why = ", before the first checkpoint of save_steps"
        raise spiked(done, place, found, why)
    path = checkpoint_path(run.folder, step)
    returns = sum(first == step + 1 for first, _ in guard.undone)
    if returns >= _RETURNS:
        raise spiked(done, place, found, f", after {returns} returns to {path.name}")
    report = verify(path) if path.is_dir() else None
    if report is None or not report.ok:
        raise spiked(done, place, found, f", and {path.name} cannot be returned to")
    return path
