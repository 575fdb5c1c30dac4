"""`qcore train`: rows and a base become a PEFT adapter that is proved to have an effect.

The whole verb, top to bottom: prepare, plan, load the base, run the steps, check that every
adapter moved, evaluate, publish. This file decides the order of the stations and when a run
evaluates, saves and stops; what each station decides is in its own file (`setup`, `loading`,
`step`, `checkpoints`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..adapter.targets import Coverage
from ..config.settings import Settings
from ..errors import InputError
from ..io.metrics_log import MetricsLog
from ..io.stop_signals import StopSignals
from ..nn.offload import OffloadedInput
from ..planning.compare import RunPlan, comparison_line
from ..planning.oom import Watch
from ..planning.run import Room, room_of
from ..planning.saved import save_plan
from ..reporting import Evaluation, Finished, Reporter, RunStarted, Step
from .auto_resume import how_to_start
from .best import BestSoFar
from .checkpoints import METRICS, RunFiles, check_best
from .finite import naming_checkpoint
from .frozen_objects import unfrozen_after
from .initial_adapter import AdapterWords
from .loading import load_base
from .metrics_sink import MetricsSink
from .report import TrainReport, first_loss, last_loss
from .rotation import checkpoint_path, checkpoints
from .run import Run
from .run_folder import check_again, locked, newest, note_rows
from .setup import DataWords, Request, Words, before_the_stop, plan_memory, prepare
from .step import Loop
from .stopping import AGAIN, WITH_RESUME, Saver, before_steps, last_words

__all__ = ["TrainReport", "train"]


def train(
    model: str,
    data: Words,
    output: str | Path,
    settings: Settings | None = None,
    *,
    eval_data: Words = (),
    data_format: str = "",
    media_root: str | Path | None = None,
    verify_data: bool = False,
    device: str = "auto",
    resume: bool = False,
    auto_resume: bool = False,
    init_adapter: str | Path | None = None,
    trust_base: bool = False,
    trust_generation: bool = False,
    origins: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
    room: Room | None = None,
    stop: StopSignals | None = None,
) -> TrainReport:
    """Fine-tune a base with LoRA over 4-bit or 16-bit weights.

    Args:
        model: a folder or a hub id.
        data: files, folders or hub ids with the rows to train on.
        output: the adapter folder to publish; absent or empty.
        settings: everything else; by default the defaults of `Settings`.
        eval_data: the same, with rows that are only evaluated.
        data_format: row format; empty: detected.
        media_root: folder of absolute media paths.
        verify_data: hash all data and media files, also those recognized as unchanged.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: continue the run that was stopped.
        auto_resume: start the run, continue it, or return its report if it is finished.
        init_adapter: adapter to start from; it sets rank, alpha, LoRA groups and class.
        trust_base: accept an `init_adapter` without a fingerprint of its base.
        trust_generation: accept such an adapter if it names a base of another generation.
        origins: source of each setting, as `load_settings` returns it: settings from a file or a
            flag must agree with `init_adapter`. ``None``: those that differ from their default.
        reporter: receives events; silent by default.
        room: memory that may be filled; by default what is free on the device.
        stop: handles signals; by default for the duration of the run, in the main thread.

    Raises:
        QcoreError: see docs/errors.md; nothing is published unless the run succeeded.
    """
    request = Request(
        model=model, data=DataWords(data, eval_data, data_format, media_root, verify_data),
        output=output, settings=settings or Settings(), device=device,
        start=AdapterWords(
            init_adapter=init_adapter, trust_base=trust_base, trust_generation=trust_generation,
            origins=origins,
        ),
        reporter=reporter or Reporter(),
    )  # fmt: skip
    with stop or StopSignals() as stop:
        return _run(request, stop, room, resume=resume, auto_resume=auto_resume)


def _run(
    request: Request, stop: StopSignals, room: Room | None, *, resume: bool, auto_resume: bool
) -> TrainReport:
    reporter = request.reporter
    with before_steps(stop, "the rows were prepared"):
        if auto_resume:
            found = how_to_start(
                request.output, request.settings, request.start.origins, reporter, resume=resume
            )
            if found.finished is not None:
                return _finished(found.finished, reporter)
            resume = found.resume
        run = prepare(request, resume=resume)
        before = before_the_stop(run) if resume else None
        plan = plan_memory(run, room or room_of(run.device), before)
    reporter.emit(RunStarted(verb="train", model=request.model, output=run.target))
    fix = AGAIN if auto_resume else WITH_RESUME
    return _finished(_execute(run, plan, stop, resume=resume, fix=fix), reporter)


def _finished(report: TrainReport, reporter: Reporter) -> TrainReport:
    reporter.emit(Finished(verb="train", output=report.output, result=report.as_json()))
    return report


def _execute(run: Run, plan: RunPlan, stop: StopSignals, *, resume: bool, fix: str) -> TrainReport:
    """Load the base, run the steps and publish; `fix` says how to continue from a checkpoint."""
    stop.grace = run.settings.grace_seconds
    stop.last_words = last_words(run, fix)
    with locked(run.folder), Watch(plan, run.device) as watch:
        check_again(run.target, run.folder, resume=resume)
        watch.at("loading the base")
        with before_steps(stop, "the base was loading"):
            base = load_base(run)
        OffloadedInput.pool(run.device).least = max(1, plan.parked)
        with unfrozen_after():
            loop = Loop(
                base.model, run.data, run.settings, run.device,
                plan.policies, plan.together, run.reader,
            )  # fmt: skip
            loop.abandonable = partial(stop.abandoning, late=True)
            best = BestSoFar()
            saver = Saver(run, base.files, loop, stop, best, fix)
            session = _Session(
                run=run, plan=plan, files=base.files, loop=loop, stop=stop, watch=watch,
                best=best, start=base.start, saver=saver,
            )  # fmt: skip
            pending = _restore(session) if resume else None
            save_plan(run.folder, plan)
            note_rows(run.folder, run.data, resume=resume)
            named = naming_checkpoint(lambda: [path for _, path in checkpoints(run.folder)])
            with saver.first_fault(), named:
                outcome = _train(session, saver.last, pending)
                return _publish(session, base.coverage, outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    """A run whose base is loaded; `start` is B of the initial adapter."""

    run: Run
    plan: RunPlan
    files: RunFiles
    loop: Loop
    stop: StopSignals
    watch: Watch
    best: BestSoFar
    start: Mapping[str, Tensor] | None
    saver: Saver

    def at(self, where: str, then: str = "then writing a checkpoint and ending") -> None:
        """Note where the run is, and what a signal would lead to."""
        self.watch.at(where)
        self.stop.doing = f"finishing {where}, {then}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
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


def _restore(session: _Session) -> Mapping[str, Any] | None:
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


def _train(session: _Session, start: int, pending: Mapping[str, Any] | None) -> _Outcome:
    """Run the steps from `start`, check that every adapter moved, evaluate at the end."""
    run, loop, metrics = session.run, session.loop, session.run.folder / METRICS
    with MetricsLog(metrics) as log:
        log.truncate_after(start - 1 if pending else start)
        session.watch.loaded()
        first, last = first_loss(metrics), math.nan
        sink = MetricsSink(log, every=run.settings.logging_steps, dropped=run.reporter.dropped)
        with run.reporter.attached(sink, required=True):
            for step in _steps(session, start, pending):
                first, last = (step.loss if math.isnan(first) else first), step.loss
            moved = _check_moved(session)
            last = last_loss(metrics) if math.isnan(last) else last
            session.saver.save_last()
            with session.saver.ending():
                _check_data(session)
                session.watch.at("the last evaluation")
                eval_loss = loop.evaluate(partial(session.saver.if_asked, loop.schedule.total))
            if eval_loss is not None:
                done = loop.schedule.total
                run.reporter.emit(Evaluation(step=done, eval_loss=eval_loss, final=True))
                session.best.see(done, eval_loss)
    published = _load_best(session)
    if published is not None:
        moved = session.loop.prove_moved(session.start)
    return _Outcome(
        first_loss=first, last_loss=last, eval_loss=eval_loss, moved=moved, published=published
    )


def _load_best(session: _Session) -> Path | None:
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


def _steps(session: _Session, start: int, pending: Mapping[str, Any] | None) -> Iterator[Step]:
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
    session: _Session, done: int, metrics: dict[str, Any], advance: Callable[[int], None]
) -> Step:
    """What follows step `done`: evaluation, report and checkpoint, each if it is due.

    The checkpoint comes before the evaluation, which may take longer than many steps.
    """
    run, loop, stop, saver = session.run, session.loop, session.stop, session.saver
    total, every = loop.schedule.total, run.settings.save_steps
    save = stop.take_save() or bool(every and done < total and done % every == 0)
    if loop.due(done):
        if save and saver.last != done:
            saver.save(done, metrics)
        session.watch.at(f"the evaluation after step {done}")
        metrics["eval_loss"] = saver.evaluate(done, metrics)
        better = session.best.see(done, metrics["eval_loss"])
        save = save or (better and run.settings.load_best_at_end)
    advance(1)
    step = Step(total=total, **metrics)
    run.reporter.emit(step)
    if step.eval_loss is not None:
        run.reporter.emit(Evaluation(step=done, eval_loss=step.eval_loss))
    if save and saver.last != done:
        saver.save(done)
    if stop.asked and done < total:
        raise saver.stopped(done, f"after step {done} of {total}")
    return step


def _check_moved(session: _Session) -> tuple[int, int]:
    """How many adapted linear maps moved, and of how many; a note says why not all did."""
    moved, maps = session.loop.prove_moved(session.start)
    if moved < maps:
        session.run.reporter.note(
            f"{maps - moved} of {maps} adapted linear maps saw no token: experts that the "
            "router never picked stay as they were"
        )
    return moved, maps


def _check_data(session: _Session) -> None:
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


def _publish(session: _Session, lines: tuple[Coverage, ...], outcome: _Outcome) -> TrainReport:
    judged = session.saver.judge(session.start, outcome.published)
    report = _report(session, lines, outcome)
    session.watch.at("publishing the adapter")
    session.stop.doing = "publishing the adapter, then ending"
    result = report.result() | {"maps_moved": list(outcome.moved)} | judged
    session.saver.publish(result, outcome.published)
    return report


def _report(session: _Session, lines: tuple[Coverage, ...], outcome: _Outcome) -> TrainReport:
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
