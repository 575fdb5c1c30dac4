"""The steps of a run, and what follows each of them: evaluation, report, checkpoint, stop.

This file decides when a run evaluates, saves and stops. With several ranks it decides by what they
agreed on in the step, so that all evaluate, save and stop after the same one. What a step computes
is up to `step`, what a checkpoint holds to `checkpoints`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import QcoreError
from ..reporting import Evaluation, Event, Step
from .session import Session


def steps(session: Session, start: int, pending: Mapping[str, Any] | None) -> Iterator[Step]:
    """The run's steps with their evaluations and checkpoints.

    Args:
        session: the run.
        start: steps that are done.
        pending: metrics of the last of them, if it is still to be evaluated.

    Raises:
        Interrupted: ``QC-TRAIN-006`` after the step and the checkpoint that follow a signal.
    """
    total = session.loop.schedule.total
    with session.run.reporter.progress("training", total, "steps") as advance:
        advance(start - bool(pending))
        if pending:
            yield _after_step(session, start, dict(pending), advance)
        for number in range(start, total):
            session.at(f"step {number + 1} of {total}")
            yield _after_step(session, number + 1, session.saver.take_step(number), advance)


def _after_step(
    session: Session, done: int, metrics: dict[str, Any], advance: Callable[[int], None]
) -> Step:
    """What follows step `done`: evaluation, report and checkpoint, each if it is due.

    The checkpoint comes before the evaluation, which may take longer than many steps.
    """
    run, loop, signals, saver = session.run, session.loop, session.signals, session.saver
    total, every = loop.schedule.total, run.settings.save_steps
    save = signals.take_save() or bool(every and done < total and done % every == 0)
    if loop.due(done):
        if save and saver.last != done:
            with saver.together():
                saver.save(done, metrics)
        session.watch.at(f"the evaluation after step {done}")
        metrics["eval_loss"] = saver.evaluate(done, metrics)
        better = session.best.see(done, metrics["eval_loss"])
        save = save or (better and run.settings.load_best_at_end)
    advance(1)
    step = Step(total=total, **metrics)
    events: list[Event] = [step]
    if step.eval_loss is not None:
        events.append(Evaluation(step=done, eval_loss=step.eval_loss))
    _emit(session, events)
    if save and saver.last != done:
        with saver.together():
            saver.save(done)
    if signals.asked and done < total:
        with saver.together():
            raise saver.stopped(done, f"after step {done} of {total}")
    return step


def _emit(session: Session, events: list[Event]) -> None:
    """Report events; with several ranks an error of a sink ends all of them with the next step."""
    try:
        for event in events:
            session.run.reporter.emit(event)
        for line in session.run.world.step(session.loop.own_tokens):
            session.run.reporter.warning(line)
    except QcoreError as error:
        if session.run.world.size == 1:
            raise
        session.loop.failure = error
