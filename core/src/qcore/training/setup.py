"""Prepares a training run: the order of all checks, and the memory plan, before a weight is read.

This file decides the order of the checks (output folder, device, model, preflight, rows, media,
kernels, and for a resumed run whether it is the same run) and asks the planner whether the run
fits in memory. What each check says is in its own file.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapter.targets import check_groups
from ..api.media import MediaReader
from ..checkpoint.tokenizer import load_tokenizer
from ..config.settings import Settings
from ..data.dataset import Dataset, dataset
from ..data.policies import Policies
from ..data.rejects import REJECTED, SHOWN, Rejects
from ..data.sampler import Schedule
from ..data.sources.read import read_sources, refuse_shared
from ..data.sources.source import Source
from ..data.store.cache import StoreCache
from ..errors import InputError, UsageError
from ..io.artifact import check_target
from ..io.run_lock import Lock
from ..nn.device import pick_device
from ..nn.kernels.registry import Chosen, choose, installed, requested
from ..nn.model import ops_of
from ..nn.recompute import POLICIES
from ..parallel.world import World
from ..planning.compare import RunPlan
from ..planning.packs import may_join, packs_of
from ..planning.run import Room, plan_run
from ..planning.saved import PreviousPlan, load_plan
from ..plugins.resolve_model import Identified, identify
from ..preflight.checks import preflight
from ..preflight.modality import reader_of, unread, with_tower
from ..preflight.tokenizer_findings import normalize_of
from ..reporting import Reporter
from .best import check_evaluates
from .disk_space import check_space
from .initial_adapter import AdapterWords, InitialAdapter, start_from
from .media_manifest import first_changed
from .ranks import ranks_of
from .resume import SAME_NUMBERS, compare, identity, refuse_finished
from .run import Run
from .run_folder import newest, run_folder

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer


Words = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class DataWords:
    """What a user says of the rows of a run.

    Attributes:
        data: what to train on: files, folders, hub ids.
        eval_data: what to evaluate on alone.
        format: row format of all sources; empty: detected.
        media_root: folder below which absolute media paths may lie.
        verify: hash the data and media files, also those that are recognized as unchanged.
    """

    data: Words
    eval_data: Words = ()
    format: str = ""
    media_root: str | Path | None = None
    verify: bool = False

    def sources(self) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
        """The sources to train on, and those to evaluate on.

        Raises:
            QcoreError: as `read_sources` and `refuse_shared`.
        """
        root = None if self.media_root is None else Path(self.media_root)
        read = partial(read_sources, format=self.format, media_root=root)
        held_out = _listed(self.eval_data)
        train = read(_listed(self.data), command="--data")
        evaluated = read(held_out, command="--eval-data") if held_out else ()
        refuse_shared(train, evaluated)
        return train, evaluated


def _listed(words: Words) -> Sequence[str | Path]:
    return (words,) if isinstance(words, str | Path) else words


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """A model and what reads rows for it."""

    model: Identified
    settings: Settings
    tokenizer: Tokenizer
    reader: MediaReader | None
    reporter: Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asks for.

    Attributes:
        model: a folder or a hub id.
        data: what ``--data`` and the options beside it say.
        output: the adapter folder to publish; absent or empty.
        settings: everything else.
        device: ``auto``, ``cpu`` or ``cuda``.
        reporter: receives events.
        start: what the user says of the adapter to start from.
        world: the ranks of the run.
    """

    model: str
    data: DataWords
    output: str | Path
    settings: Settings
    device: str
    reporter: Reporter
    start: AdapterWords
    world: World


def prepare(request: Request, *, resume: bool) -> Run:
    """Check everything that needs no weight.

    Args:
        request: what is asked for.
        resume: continue the run that was stopped.

    Raises:
        QcoreError: see docs/errors.md.
    """
    settings, reporter = request.settings, request.reporter
    if resume:
        refuse_finished(Path(request.output))
    target = check_target(request.output)
    chosen = pick_device(request.device)
    identified = identify(request.model, generation=settings.generation)
    identified = identified.quantizing(settings.quantize_groups)
    initial, settings, lines = start_from(request.start, identified, settings)
    reporter.lines(lines)
    base = _Base(
        model=identified,
        settings=settings,
        reader=reader_of(identified, reporter),
        tokenizer=load_tokenizer(identified.checkpoint),
        reporter=reporter,
    )
    reported = _preflight(base)
    folder = run_folder(target, resume=resume)  # its fix deletes files: settings are checked first
    rows = _read_rows(base, request.data, folder)
    check_evaluates(settings.load_best_at_end, len(rows.eval))
    reporter.lines(initial.other_variables(rows.chat.kwargs) if initial else ())
    base = _with_tower(base, rows, reported, initial)
    return Run(
        model=base.model,
        data=rows,
        summary=rows.summary(),
        settings=settings,
        device=chosen,
        kernels=_kernels(base, chosen),
        reader=base.reader,
        target=target,
        folder=folder,
        reporter=reporter,
        initial=initial,
        world=request.world,
    )


def _preflight(base: _Base, reported: Collection[str] = ()) -> list[str]:
    """Report what preflight says of a model, less what was `reported` before."""
    check_groups(base.model.layout, base.settings.target_groups)
    ids = base.tokenizer.get_vocab()
    lines = [
        *base.model.decision.evidence,
        *preflight(
            base.model, verb="train", settings=base.settings, token_ids=ids,
            normalize=normalize_of(base.tokenizer),
        ),
    ]  # fmt: skip
    base.reporter.lines(line for line in lines if line not in reported)
    return lines


def _read_rows(base: _Base, data: DataWords, folder: Path) -> Dataset:
    """The rows, with every fault in them found."""
    settings = base.settings
    sources, eval_sources = data.sources()
    if eval_sources and settings.eval_fraction:
        raise UsageError(
            "QC-CONFIG-007",
            "holds out rows of --data, and --eval-data names the rows to evaluate",
            field="eval_fraction",
            found=f"{settings.eval_fraction} with --eval-data",
            fix="set eval_fraction=0, or leave --eval-data out",
        )
    if settings.eval_steps and not (settings.eval_fraction or eval_sources):
        raise UsageError(
            "QC-CONFIG-007",
            "needs held-out rows, but none are held out",
            field="eval_steps",
            found=f"{settings.eval_steps} with eval_fraction 0",
            fix="set eval_fraction, pass --eval-data, or leave eval_steps out",
        )
    rows = dataset(
        sources,
        base.model.checkpoint,
        base.model.chat_format(),
        settings.max_length,
        settings.eval_fraction,
        settings.seed,
        eval_data=eval_sources,
        policies=Policies.of(settings),
        tokenizer=base.tokenizer,
        variables=settings.chat_template_kwargs,
        reader=base.reader,
        unread="" if base.reader is not None else unread(base.model),
        workers=settings.dataset_num_proc,
        refused=partial(_write_rejects, folder),
        cache=StoreCache.of_user(base.reporter, verify=data.verify),
    )
    base.reporter.lines(rows.lines())
    return rows


def _write_rejects(folder: Path, rejects: Rejects) -> None:
    """Write ``rejected.jsonl`` to the folder of a run that does not start.

    Only if there are more bad rows than the error shows: a run that does not start leaves nothing
    behind without need.
    """
    if rejects.count <= SHOWN:
        return
    with Lock(folder, create=True):
        rejects.write(folder / REJECTED)


def _with_tower(
    base: _Base, rows: Dataset, reported: Collection[str], initial: InitialAdapter | None
) -> _Base:
    """The model as these rows need it; preflight runs again where a tower is loaded."""
    settings = base.settings
    fix = "remove the group, or " if initial is None else ""
    model, lines = with_tower(
        base.model, settings.target_groups, rows.kinds,
        quantized=settings.quantize_groups, reached=partial(_reaches_media, rows, settings),
        fix=f"{fix}train on rows with media",
    )  # fmt: skip
    base.reporter.lines(lines)
    if model is base.model:
        return base
    base = replace(base, model=model)
    _preflight(base, reported)
    return base


def _reaches_media(rows: Dataset, settings: Settings) -> bool:
    """Whether any step of the run has a row with media."""
    schedule = Schedule(rows.train_sizes, settings, rows.train.lengths)
    units = rows.train.units
    return bool(units) and any(
        units[row]
        for step in range(schedule.total)
        for batch in schedule.micro_batches(step)
        for row in batch
    )


def _kernels(base: _Base, device: torch.device) -> Chosen:
    """A backend for each op of the model, verified on the device."""
    model = base.model
    used = ops_of(
        model.decision.architecture, model.checkpoint.config, model.layout, model.modality
    )
    listed = installed(model.plugins)
    wanted = requested(listed, base.settings.kernels, used.ops)
    kernels = choose(listed, device, wanted, used)
    base.reporter.lines(kernels.lines())
    return kernels


def before_the_stop(run: Run) -> PreviousPlan:
    """What a resumed run computed under before it was stopped.

    Raises:
        InputError: ``QC-RESUME-002`` when it is another run than the one that was stopped.
    """
    last, _ = newest(run.folder)
    changed: dict[str, str] = {}
    if last is not None:
        try:
            changed = compare(last[1], identity(run))
        except InputError as error:
            if error.field == "media" and (which := first_changed(run.folder, run.data)):
                error = error.replace(file=run.data.path, field=which, found=None, expected=None)
            raise error from None
    before, lines = load_plan(run.folder, POLICIES)
    if not changed.keys().isdisjoint(SAME_NUMBERS):  # the settings ask for other policies
        before, lines = replace(before, policies=()), []
    run.reporter.lines((*changed.values(), *lines))
    return before


def plan_memory(run: Run, room: Room, before: PreviousPlan | None) -> RunPlan:
    """What the rows take of the device; a resumed run keeps its policies where they fit.

    Args:
        run: the run.
        room: what may be filled.
        before: of a resumed run.

    Raises:
        InputError: ``QC-PLAN-001`` or ``-006``, the run does not fit.
        WriteError: ``QC-WRITE-007`` its files do not fit on the disk.
    """
    data, settings = run.data, run.settings
    pack = partial(
        packs_of, data.train.lengths, data.eval.lengths, settings,
        units=data.train.units, held_out_units=data.eval.units,
        sizes=data.train_sizes, ranks=run.world.size,
    )  # fmt: skip
    plan, notes = plan_run(
        run.model, settings, pack(), room, backends=run.kernels, before=before,
        join=(lambda most: pack(together=most)) if may_join(settings) else None,
        ranks=ranks_of(run.world, room),
    )  # fmt: skip
    run.reporter.lines((plan.line(), *notes))
    check_space(run, plan)
    return plan
