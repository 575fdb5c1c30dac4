"""`qcore train`: rows and a base become a PEFT adapter that is proved to have an effect.

The whole verb, top to bottom: prepare, plan, load the base, run the steps, check that every
adapter moved, evaluate, publish. This file decides the order of the stations; what each station
decides is in its own file (`setup`, `loading`, `steps`, `ending`, `checkpoints`).

With several ranks each of them passes all stations. The first rank prepares the rows before the
others, and it alone writes and reports; an error of one rank in a station ends all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ..config.settings import Settings
from ..io.metrics_log import MetricsLog
from ..io.stop_signals import StopSignals
from ..nn.device import pick_device
from ..nn.offload import OffloadedInput
from ..parallel.agreement import together, turns
from ..parallel.world import World, is_rank
from ..planning.compare import RunPlan
from ..planning.oom import Watch
from ..planning.run import Room, room_of
from ..planning.saved import save_plan
from ..reporting import Finished, Reporter, RunStarted
from .auto_resume import Start, how_to_start
from .best import BestSoFar
from .checkpoints import METRICS
from .ending import check_moved, last_evaluation, load_best, publish
from .finite import naming_checkpoint
from .frozen_objects import unfrozen_after
from .initial_adapter import AdapterWords
from .loading import load_base
from .metrics_sink import MetricsSink
from .ranks import check_output, check_ranks, note_idle, scaled, smallest_room
from .report import TrainReport, first_loss, last_loss
from .rotation import checkpoints
from .run import Run
from .run_folder import check_again, locked, note_rows
from .session import Outcome, Session, restore
from .setup import DataWords, Request, Words, before_the_stop, plan_memory, prepare
from .shared_signals import SharedSignals
from .step import Loop
from .steps import steps
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
    world: World | None = None,
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
        world: the ranks; by default those that ``torchrun`` describes, or this process alone.

    Raises:
        QcoreError: see docs/errors.md; nothing is published unless the run succeeded.
    """
    with ExitStack() as stack:
        world = world or stack.enter_context(_world(device, settings or Settings()))
        reporter = (reporter if world.first else None) or Reporter()
        start = AdapterWords(init_adapter, trust_base, trust_generation, origins)
        request = Request(
            model=model, data=DataWords(data, eval_data, data_format, media_root, verify_data),
            output=output, settings=scaled(settings or Settings(), world, reporter),
            device=device, reporter=reporter, world=world, start=start,
        )  # fmt: skip
        signals = stack.enter_context(stop or StopSignals())
        return _run(request, signals, room, resume=resume, auto_resume=auto_resume)


def _world(device: str, settings: Settings) -> World:
    """The ranks that torchrun describes, or this process alone."""
    if not is_rank():
        return World.alone()
    return World.of_environment(pick_device(device), timedelta(seconds=settings.rank_timeout))


def _run(
    request: Request, stop: StopSignals, room: Room | None, *, resume: bool, auto_resume: bool
) -> TrainReport:
    reporter, world = request.reporter, request.world
    run: Run | None = None
    for own in turns(world):
        with together(world), before_steps(stop, "the rows were prepared"):
            if own:
                start = _start(request, resume=resume, auto_resume=auto_resume)
                if start.finished is None:
                    run = prepare(request, resume=start.resume)
    check_output(world, output=start.kind)
    if start.finished is not None or run is None:
        assert start.finished is not None
        return _finished(start.finished, reporter)
    room = smallest_room(world, room or room_of(run.device))
    with together(world), before_steps(stop, "the rows were prepared"):
        before = before_the_stop(run) if start.resume else None
        plan = plan_memory(run, room, before)
    check_ranks(run, plan)
    reporter.emit(RunStarted(verb="train", model=request.model, output=run.target))
    fix = AGAIN if auto_resume else WITH_RESUME
    return _finished(_execute(run, plan, stop, resume=start.resume, fix=fix), reporter)


def _start(request: Request, *, resume: bool, auto_resume: bool) -> Start:
    """How the run starts."""
    if not auto_resume:
        return Start(resume=resume)
    settings, origins = request.settings, request.start.origins
    return how_to_start(request.output, settings, origins, request.reporter, resume=resume)


def _finished(report: TrainReport, reporter: Reporter) -> TrainReport:
    reporter.emit(Finished(verb="train", output=report.output, result=report.as_json()))
    return report


def _execute(run: Run, plan: RunPlan, stop: StopSignals, *, resume: bool, fix: str) -> TrainReport:
    """Load the base, run the steps and publish; `fix` says how to continue from a checkpoint."""
    stop.grace = run.settings.grace_seconds
    stop.last_words = last_words(run, fix)
    world, watch = run.world, Watch(plan, run.device)
    with ExitStack() as stack:
        with together(world):
            if world.first:
                stack.enter_context(locked(run.folder))
                check_again(run.target, run.folder, resume=resume)
        stack.enter_context(watch)
        watch.at("loading the base")
        with together(world), watch, before_steps(stop, "the base was loading"):
            base = load_base(run, sharded=plan.sharded, stop=stop)
        check_ranks(run, plan, base.files)
        OffloadedInput.pool(run.device).least = max(1, plan.parked)
        stack.enter_context(unfrozen_after())
        loop = Loop(
            base.model, run.data, run.settings, run.device,
            plan.policies, plan.together, run.reader, world,
        )  # fmt: skip
        loop.abandonable = partial(stop.abandoning, late=True)
        loop.watch, loop.signals = watch, SharedSignals(stop, world)
        best = BestSoFar()
        saver = Saver(run, base.files, loop, stop, best, fix)
        session = Session(
            run=run, plan=plan, files=base.files, loop=loop, signals=loop.signals, watch=watch,
            best=best, start=base.start, saver=saver,
        )  # fmt: skip
        note_idle(run, loop.schedule)
        with together(world):
            pending = restore(session) if resume else None
            if world.first:
                save_plan(run.folder, plan)
                note_rows(run.folder, run.data, resume=resume)
        check_output(world, checkpoint=f"that of step {saver.last}" if saver.last else "none")
        named = naming_checkpoint(lambda: [path for _, path in checkpoints(run.folder)])
        with saver.first_fault(), named:
            outcome = _train(session, saver.last, pending)
            return publish(session, base.coverage, outcome)


def _train(session: Session, start: int, pending: Mapping[str, Any] | None) -> Outcome:
    """Run the steps from `start`, check that every adapter moved, evaluate at the end."""
    run, metrics = session.run, session.run.folder / METRICS
    with ExitStack() as stack:
        first = last = math.nan
        with together(run.world):
            if run.world.first:
                log = stack.enter_context(MetricsLog(metrics))
                log.truncate_after(start - 1 if pending else start)
                first = first_loss(metrics)
                sink = MetricsSink(
                    log, every=run.settings.logging_steps, dropped=run.reporter.dropped
                )
                stack.enter_context(run.reporter.attached(sink, required=True))
        session.watch.loaded()
        for step in steps(session, start, pending):
            first, last = (step.loss if math.isnan(first) else first), step.loss
        moved = check_moved(session)
        if math.isnan(last) and run.world.first:
            last = last_loss(metrics)
        eval_loss = last_evaluation(session)
    first, last = run.world.broadcast([first, last])
    with together(run.world):
        published = load_best(session)
    if published is not None:
        moved = session.loop.prove_moved(session.start)
    return Outcome(
        first_loss=first, last_loss=last, eval_loss=eval_loss, moved=moved, published=published
    )
