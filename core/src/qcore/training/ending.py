"""The end of a run: what is checked after the last step, and which adapter is published.

This file decides the order after the last step (adapters moved, checkpoint, data files unchanged,
last evaluation, best checkpoint, gain, publication) and what the report compares. What a gain is,
is up to `verdict`; what an adapter folder holds, to `checkpoints`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..adapter.targets import Coverage
from ..errors import InputError
from ..parallel.agreement import together
from ..planning.compare import comparison_line
from ..reporting import Evaluation
from .report import TrainReport
from .rotation import checkpoint_path
from .session import Outcome, Session


def last_evaluation(session: Session) -> float | None:
    """Save the last step, check the data files and evaluate the held-out rows.

    Raises:
        Interrupted: ``QC-TRAIN-006``.
        InputError: ``QC-DATA-081``.
        NumericError: ``QC-TRAIN-012``.
    """
    run, loop, saver = session.run, session.loop, session.saver
    saver.save_last()
    with saver.ending():
        with together(run.world), session.signals.alone():
            if run.world.first:
                _check_data(session)
        session.watch.at("the last evaluation")
        eval_loss = loop.evaluate(partial(saver.if_asked, loop.schedule.total))
    if eval_loss is not None:
        done = loop.schedule.total
        run.reporter.emit(Evaluation(step=done, eval_loss=eval_loss, final=True))
        session.best.see(done, eval_loss)
    return eval_loss


def load_best(session: Session) -> Path | None:
    """Name the best evaluation; restore its adapter where ``load_best_at_end`` asks for it.

    Returns:
        The checkpoint that is published; ``None`` for the tensors of the last step.

    Raises:
        InputError: ``QC-RESUME-006`` the best checkpoint was removed or damaged meanwhile.
    """
    run, best, total = session.run, session.best.best, session.loop.schedule.total
    wanted = run.settings.load_best_at_end
    if best is None:
        return None
    line = f"lowest eval_loss {best.eval_loss:.4f} after step {best.step} of {total}"
    path = checkpoint_path(run.folder, best.step)
    if best.step == total:
        run.reporter.note(f"{line}: it is the last step, which is published")
        return None
    if wanted:
        run.reporter.note(f"{line}: {path.name} is published")
        return session.files.load_best(run.folder, best.step)
    kept = f"kept in {path}" if path.is_dir() else "load_best_at_end publishes it"
    run.reporter.note(f"{line}; the last step is published ({kept})")
    return None


def check_moved(session: Session) -> tuple[int, int]:
    """How many adapted linear maps moved, and of how many; a note says why not all did."""
    moved, maps = session.loop.prove_moved(session.start)
    if moved < maps:
        session.run.reporter.note(
            f"{maps - moved} of {maps} adapted linear maps saw no token: experts that the "
            "router never picked stay as they were"
        )
    return moved, maps


def _check_data(session: Session) -> None:
    """Check that the data files are still those whose digests the manifest records.

    The steps are done; a checkpoint keeps them, so that restoring the file is enough.

    Raises:
        InputError: ``QC-DATA-081``.
    """
    run = session.run
    session.watch.at("hashing the data files")
    try:
        run.data.check_files(run.reporter)
    except InputError as error:
        path = checkpoint_path(run.folder, session.loop.schedule.total)
        if not path.is_dir():
            raise
        fix = f"restore the file and run the same command with --resume; {path} holds all steps"
        raise error.replace(fix=fix) from None


def publish(session: Session, lines: tuple[Coverage, ...], outcome: Outcome) -> TrainReport:
    """Judge the run and publish its adapter; the first rank writes it.

    Raises:
        NumericError: ``QC-TRAIN-018``.
        WriteError: the output cannot be written.
    """
    with together(session.run.world):
        judged = session.saver.judge(session.start, outcome.published)
        report = _report(session, lines, outcome)
        session.watch.at("publishing the adapter")
        session.signals.stop.doing = "publishing the adapter, then ending"
        result = report.result() | {"maps_moved": list(outcome.moved)} | judged
        session.saver.publish(result, outcome.published)
    return report


def _report(session: Session, lines: tuple[Coverage, ...], outcome: Outcome) -> TrainReport:
    """The report, and a note that compares what was measured with the plan."""
    run, plan, loop, best = session.run, session.plan, session.loop, session.best.best
    measured = loop.meter.measured(run.device.type)
    run.reporter.note(comparison_line(plan, measured))
    return TrainReport(
        output=run.target,
        steps=loop.schedule.total,
        first_loss=outcome.first_loss,
        last_loss=outcome.last_loss,
        eval_loss=outcome.eval_loss,
        best_evaluation=None if best is None else best.as_json(),
        published_step=best.step if outcome.published and best else loop.schedule.total,
        adapter_class=session.files.namespace.name,
        coverage=lines,
        plan=plan.as_json(),
        measured=measured.as_json(),
    )
