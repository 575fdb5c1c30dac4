"""Train: rows + base -> a PEFT adapter that is proved to have an effect.

The whole verb, top to bottom: identify and preflight, encode the rows, plan what they take of
the card, stream the base in, say what will be trained, run the steps, publish. What each station
decides is in its own file (`plan.run` the policy, `loop` the step, `state` the files); this one
decides their order and what makes a run fail before and after the loop: a group that is declared
4-bit and is not, an adapter that never moved.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapter.peft_names import choose_class
from ..adapter.targets import Coverage, coverage, targets
from ..api.parameters import Store
from ..config.settings import Settings
from ..data.dataset import Dataset, dataset
from ..data.masking import load_tokenizer
from ..data.media_files import MediaReader
from ..data.microbatches import units_of_rows
from ..data.sampler import Schedule
from ..errors import InputError, Interrupted, NumericError
from ..io.artifact import check_target
from ..io.run_lock import MetricsLog
from ..io.stop_signals import StopSignals
from ..nn.device import DTYPES, pick_device
from ..nn.kernels.registry import Chosen, choose, installed, requested
from ..nn.load import load
from ..nn.model import Model, ops_of
from ..nn.offload import OffloadedInput
from ..nn.qlora.lora_layer import Lora
from ..nn.recompute import POLICIES
from ..planning.compare import RunPlan, beside, measured
from ..planning.oom import Watch
from ..planning.packs import may_join, packs_of
from ..planning.run import Room, plan_run, room_of
from ..planning.saved import Before, keep, kept
from ..plugins.resolve_model import Identified, classes_of, identify
from ..preflight.checks import preflight
from ..preflight.modality import reader_of, unread, with_tower
from ..reporting import Reporter, Silent
from .checkpoints import METRICS, RunFiles, locked, newest, run_folder
from .media_manifest import first_changed, note_media
from .report import TrainReport, coverage_row, first_loss, is_logged
from .resume import SAME_NUMBERS, compare, identity
from .step import Loop

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["TrainReport", "train"]


def train(
    model: str,
    data: str | Path,
    output: str | Path,
    settings: Settings,
    *,
    device: str = "auto",
    resume: bool = False,
    reporter: Reporter | None = None,
    room: Room | None = None,
) -> TrainReport:
    """Fine-tune a base with LoRA over 4-bit or 16-bit weights.

    Args:
        model: a folder or a hub id.
        data: chat JSONL.
        output: the adapter folder to publish; absent or empty.
        settings: everything else.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: go on with the run that was stopped.
        reporter: who is told; nobody by default.
        room: what may be filled; by default what is free on the device.

    Raises:
        QcoreError: see docs/errors.md; nothing is published unless the run succeeded.
    """
    tell = reporter or Silent()
    target = check_target(output)
    folder = run_folder(target, resume=resume)
    where = pick_device(device)
    found = identify(model, generation=settings.generation).quantizing(settings.quantize_groups)
    reader = reader_of(found, tell)
    rows, found = _read(found, data, settings, reader, tell)
    backends = _backends(found, settings, where, tell)
    before = _before(found, rows, settings, where, backends, folder, tell) if resume else None
    plan = _plan(found, rows, settings, room or room_of(where), backends, before, tell)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        stop = stack.enter_context(StopSignals())
        log = stack.enter_context(MetricsLog(folder / METRICS))
        watch = stack.enter_context(Watch(plan, where))
        watch.at("loading the base")
        net, files, lines = _load(found, rows, settings, where, backends, tell, stop)
        OffloadedInput.pool(where).least = max(1, plan.parked)
        if not gc.get_freeze_count():
            stack.callback(gc.unfreeze)  # what the loop freezes, not what a caller did
        loop = Loop(net, rows, settings, where, plan.policies, plan.together, reader)
        start = _resume(files, loop, folder, tell) if resume else 0
        keep(folder, plan)
        note_media(folder, rows, resume=resume)
        log.truncate_after(start)
        watch.loaded()
        first, last = first_loss(folder / METRICS), math.nan
        for metrics in _steps(loop, files, folder, start, stop, tell, watch):
            first, last = (metrics["loss"] if first != first else first), metrics["loss"]
            if is_logged(metrics, settings, loop.schedule.total):
                log.write(metrics)
            tell.step(metrics)
        moved = _moved(loop, tell)
        watch.at("the last evaluation")
        eval_loss = loop.evaluate()
        if eval_loss is not None:
            log.write({"step": loop.schedule.total, "eval_loss": eval_loss})
        log.close()
        report = TrainReport(
            output=target,
            steps=loop.schedule.total,
            first_loss=first,
            last_loss=last,
            eval_loss=eval_loss,
            adapter_class=files.namespace.name,
            coverage=tuple(lines),
            plan=plan.as_json(),
            measured=measured(loop.meter, where.type),
        )
        tell.note(beside(plan, loop.meter, where.type))
        watch.at("publishing the adapter")
        files.publish(target, folder / METRICS, report.result() | {"maps_moved": moved})
    return report


def _moved(loop: Loop, tell: Reporter) -> list[int]:
    """How many adapted linear maps moved, and of how many; why not all is said."""
    moved, maps = loop.prove_moved()
    if moved < maps:
        tell.note(
            f"{maps - moved} of {maps} adapted linear maps saw no token: experts that the "
            "router never picked stay as they were"
        )
    return [moved, maps]


def _read(
    found: Identified,
    data: str | Path,
    settings: Settings,
    reader: MediaReader | None,
    tell: Reporter,
) -> tuple[Dataset, Identified]:
    """The rows, and the model as they need it: all that can be wrong before a weight is read."""
    tokenizer = load_tokenizer(found.checkpoint)
    said = _preflight(found, settings, tokenizer, tell)
    rows = _rows(found, data, settings, reader, tokenizer, tell)
    return rows, _tower(found, rows, settings, tokenizer, said, tell)


def _preflight(
    found: Identified,
    settings: Settings,
    tokenizer: Tokenizer,
    tell: Reporter,
    said: Collection[str] = (),
) -> list[str]:
    """What guards say of a model before a weight is read; what was `said` is not told again."""
    given, ids = settings.to_dict(), tokenizer.get_vocab()
    lines = [
        *found.decision.evidence,
        *preflight(found, verb="train", settings=given, token_ids=ids),
    ]
    for line in lines:
        if line not in said:
            tell.note(line)
    return lines


def _rows(
    found: Identified,
    data: str | Path,
    settings: Settings,
    reader: MediaReader | None,
    tokenizer: Tokenizer,
    tell: Reporter,
) -> Dataset:
    """The rows, all that can be wrong with them found."""
    rows = dataset(
        data,
        found.checkpoint,
        found.chat_format(),
        settings.max_length,
        settings.eval_fraction,
        settings.seed,
        tokenizer=tokenizer,
        variables=settings.chat_template_kwargs,
        reader=reader,
        unread="" if reader is not None else unread(found),
    )
    tell.note(
        f"{rows.rows} rows, {rows.tokens} tokens, {rows.supervised} of them supervised "
        f"({100 * rows.supervised / rows.tokens:.0f} %), longest row {rows.longest} tokens"
    )
    return rows


def _tower(
    found: Identified,
    rows: Dataset,
    settings: Settings,
    tokenizer: Tokenizer,
    said: Collection[str],
    tell: Reporter,
) -> Identified:
    """The model as these rows need it: what guards say of a tower is asked when one is loaded."""
    before = found
    found, told = with_tower(
        found, settings.target_groups, rows.kinds,
        quantized=settings.quantize_groups, reached=partial(_reached, rows, settings),
    )  # fmt: skip
    for line in told:
        tell.note(line)
    if found is not before:
        _preflight(found, settings, tokenizer, tell, said)
    return found


def _reached(rows: Dataset, settings: Settings) -> bool:
    """Whether any step of the run has a row with media."""
    schedule = Schedule(len(rows.train), settings)
    return any(
        rows.train[row].media
        for step in range(schedule.total)
        for batch in schedule.micro_batches(step)
        for row in batch
    )


def _backends(
    found: Identified, settings: Settings, device: torch.device, tell: Reporter
) -> Chosen:
    """A backend for each op of the model, verified on the device."""
    used = ops_of(
        found.decision.architecture, found.checkpoint.config, found.layout, found.modality
    )
    listed = installed(found.plugins)
    backends = choose(listed, device, requested(listed, settings.kernels, used.ops), used)
    for line in backends.lines():
        tell.note(line)
    return backends


def _before(
    found: Identified,
    rows: Dataset,
    settings: Settings,
    device: torch.device,
    backends: Chosen,
    folder: Path,
    tell: Reporter,
) -> Before:
    """Refuse another run than the one that was stopped; what it computed under, if that holds."""
    last, _ = newest(folder)
    changed: dict[str, str] = {}
    if last is not None:
        now = identity(found, settings, rows.summary(), device.type, backends.backends)
        try:
            changed = compare(last[1], now)
        except InputError as error:
            if error.field == "media" and (which := first_changed(folder, rows)):
                error = InputError(
                    error.code, error.what, file=rows.path, field=which, fix=error.fix
                )
            raise error from None
    before, said = kept(folder, POLICIES)
    if not changed.keys().isdisjoint(SAME_NUMBERS):  # the settings ask for other policies
        before, said = replace(before, policies=()), []
    for line in (*changed.values(), *said):
        tell.note(line)
    return before


def _plan(
    found: Identified,
    rows: Dataset,
    settings: Settings,
    room: Room,
    backends: Chosen,
    before: Before | None,
    tell: Reporter,
) -> RunPlan:
    """What the rows take of the card, before a weight is read; a resumed run's policy stays."""
    train, held_out = ([len(row.ids) for row in part] for part in (rows.train, rows.eval))
    pack = partial(
        packs_of, train, held_out, settings,
        units=units_of_rows(rows.train), held_out_units=units_of_rows(rows.eval),
    )  # fmt: skip
    plan, notes = plan_run(
        found, settings, pack(), room, backends=backends, before=before,
        join=(lambda most: pack(together=most)) if may_join(settings) else None,
    )  # fmt: skip
    for line in (plan.line(), *notes):
        tell.note(line)
    return plan


def _load(
    found: Identified,
    rows: Dataset,
    settings: Settings,
    device: torch.device,
    backends: Chosen,
    tell: Reporter,
    stop: StopSignals,
) -> tuple[Model, RunFiles, list[Coverage]]:
    """The base on the device, adapters on it, and the table of what will be trained."""
    layout, config = found.layout, found.checkpoint.config
    architecture = found.decision.architecture
    lora = Lora(r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout)
    chosen = targets(
        layout,
        settings.target_groups,
        lora,
        group_r={name: int(r) for name, r in settings.group_r.items()},
        group_lora_alpha={name: float(x) for name, x in settings.group_lora_alpha.items()},
    )
    touched = {layout.table[name].part.name for name in chosen}
    namespace = choose_class(layout, touched, classes_of(config), settings.adapter_class)
    net = Model(
        architecture, config, layout, DTYPES[settings.dtype], chosen, backends,
        modality=found.modality,
    )  # fmt: skip
    size = sum(
        place.header.end - place.header.start
        for item in layout.located.values()
        if layout.loads(item.tensor.part)
        for place in item.places
    )
    quantize = settings.quantization == "nf4"
    with tell.progress("loading the base", size, "bytes") as advance:

        def read(count: int) -> None:
            advance(count)
            if stop.asked:  # loading can outlast the grace that a scheduler gives
                raise Interrupted(
                    "QC-TRAIN-006",
                    f"stopped by {stop.asked} while the base was loading",
                    fix="run the same command again",
                )

        digests = load(
            net, layout, found.checkpoint, device=device, quantize=quantize, progress=read
        )
    for name, module in net.adapters():
        module.reset_lora(name, settings.seed, device)
    lines = coverage(net, layout)
    tell.table("what will be trained", [coverage_row(line) for line in lines])
    if quantize:
        tell.note(_prove_quantised(net, found, lines))
    files = RunFiles(
        found=found,
        model=net,
        settings=settings,
        namespace=namespace,
        digests=digests,
        data=rows.summary(),
        coverage=[asdict(line) for line in lines],
        device=device.type,
        kernels=backends.backends,
    )
    return net, files, lines


def _prove_quantised(net: Model, found: Identified, lines: list[Coverage]) -> str:
    """A tensor that the table declares 4-bit is held in 4 bit, or the run stops."""
    for entry in found.layout.table:
        if found.layout.store(entry.row) is Store.NF4 and found.layout.loads(entry.part):
            holder = net.lora_layers.get(entry.name)
            if holder is None or not holder.four_bit:
                raise NumericError(
                    "QC-TRAIN-005",
                    "is declared 4-bit and is not",
                    field=entry.name,
                    fix="report this, or pass --set quantization=none",
                )
    four = sum(line.four_bit for line in lines)
    whole = sum(line.parameters for line in lines)
    return f"{100 * four / whole:.1f} % of the loaded parameters are held in 4 bit"


def _resume(files: RunFiles, loop: Loop, folder: Path, tell: Reporter) -> int:
    """Restore the newest checkpoint; returns the steps that are done."""
    last, damaged = newest(folder)
    for line in damaged:
        tell.note(line)
    if last is None:
        tell.note("no checkpoint was written before the run stopped: starting at step 1")
        return 0
    step, path = last
    files.restore(path, loop.optimizer)
    tell.note(f"resuming after step {step} of {loop.schedule.total}")
    return step


def _steps(
    loop: Loop,
    files: RunFiles,
    folder: Path,
    start: int,
    stop: StopSignals,
    tell: Reporter,
    watch: Watch,
) -> Iterator[dict[str, Any]]:
    """The run's steps with their evaluations and checkpoints; stops when asked to."""
    every, total = loop.settings.save_steps, loop.schedule.total
    with tell.progress("training", total, "steps") as advance:
        advance(start)
        for step in range(start, total):
            done = step + 1
            watch.at(f"step {done}")
            metrics = loop.step(step)
            if loop.due(done):
                watch.at(f"the evaluation after step {done}")
                metrics["eval_loss"] = loop.evaluate()
            advance(1)
            yield metrics
            if done == total:
                return
            if stop.asked or (every and done % every == 0):
                files.save(folder, done, loop.optimizer)
            if stop.asked:
                raise Interrupted(
                    "QC-TRAIN-006",
                    f"stopped by {stop.asked} after step {done} of {total}",
                    file=folder / f"checkpoint-{done}",
                    fix="run the same command with --resume",
                )
