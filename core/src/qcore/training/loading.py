"""Loads the base onto the device in 4 or 16 bit, and attaches LoRA to the chosen weights.

This file decides which weights carry an adapter and for which class the adapter is written, that
loading can be interrupted, and that a weight which the table declares 4-bit is held in 4 bit. How
a weight is read and quantized is up to `nn.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from ..adapter.targets import Coverage, coverage, lora_targets
from ..adapter.written_config import choose_class
from ..api.blocks import Packed
from ..api.parameters import Namespace, Store
from ..checkpoint.fingerprint import fingerprints
from ..errors import NumericError, PluginError
from ..io.stop_signals import StopSignals
from ..nn.device import DTYPES
from ..nn.load import load
from ..nn.model import Model
from ..nn.qlora.lora_layer import Lora, LoraLayer
from ..nn.sharding.base import ShardedBase, gathered_layers
from ..nn.sharding.load import load_shards, share_of_bytes
from ..nn.token_rows import TrainedRows
from ..plugins.resolve_model import Identified, classes_of
from .checkpoints import RunFiles
from .report import coverage_row
from .run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model on the device.

    Attributes:
        model: with adapters.
        files: writes and reads what the run keeps.
        coverage: what will be trained, by group.
        start: B of each weight in the initial adapter; ``None``: B starts at zero.
    """

    model: Model
    files: RunFiles
    coverage: tuple[Coverage, ...]
    start: Mapping[str, Tensor] | None


def load_base(run: Run, *, sharded: bool = False, stop: StopSignals | None = None) -> Loaded:
    """Stream the base in, and put adapters on the chosen weights.

    Args:
        run: what to load.
        sharded: whether each rank holds some rows of the layers; otherwise it holds all.
        stop: of a sharded base, which no rank leaves in the middle of what the ranks exchange.

    Raises:
        NumericError: ``QC-TRAIN-005`` a weight that is declared 4-bit is not; ``-014`` a weight
            with DoRA has rows of zeros.
        InputError: ``QC-TRAIN-009`` or ``-010``, the initial adapter is not for this run or base.
    """
    stop = stop or StopSignals()
    with stop.finishing() if sharded else nullcontext():
        return _loaded(run, sharded, stop)


def _loaded(run: Run, sharded: bool, stop: StopSignals) -> Loaded:
    chosen, namespace = _targets(run)
    model = Model(
        run.model.decision.architecture, run.model.checkpoint.config, run.model.layout,
        DTYPES[run.settings.dtype], chosen, run.kernels, modality=run.model.modality,
        token_ids=run.settings.trainable_token_indices,
        head_token_ids=run.settings.trainable_head_token_indices,
    )  # fmt: skip
    if sharded:
        model.sharded = ShardedBase(
            model, run.model.layout, run.world, run.device, quantize=_quantizes(run)
        )
    digests = _stream(run, model, stop)
    start = _start(run, model, digests)
    lines = coverage(model, run.model.layout)
    run.reporter.table("what will be trained", [coverage_row(line) for line in lines])
    if _quantizes(run):
        run.reporter.note(_check_four_bit(model, run.model, lines))
    files = RunFiles(
        run=run,
        model=model,
        namespace=namespace,
        digests=digests,
        coverage=[asdict(line) for line in lines],
    )
    return Loaded(model=model, files=files, coverage=tuple(lines), start=start)


def _start(run: Run, model: Model, digests: Mapping[str, str]) -> Mapping[str, Tensor] | None:
    """Set the matrices that the run starts with; returns B of the initial adapter."""
    if model.trained_rows is not None:
        _start_rows(model, model.trained_rows)
    if run.initial is None:
        for name, module in gathered_layers(model.sharded, dict(model.adapters())):
            module.reset_lora(name, run.settings.seed, run.device)
            if run.settings.use_dora:
                _check_magnitude(name, module)
        return None
    run.initial.check_base(run.model, fingerprints(run.model.layout, digests))
    return run.initial.load_into(model, run.device)


@torch.no_grad()
def _start_rows(model: Model, trained: TrainedRows) -> None:
    """Start the trained rows of embedding and head from the base's.

    Raises:
        PluginError: ``QC-MODEL-005`` what the trunk reads of a token is not its row.
    """
    for rows, name in ((trained.embed, model.embed_name), (trained.head, model.head_name)):
        if rows is not None:
            weight = model.get_parameter(name)
            rows.reset(weight.index_select(0, rows.index(weight)))
    if trained.embed is None:
        return
    embedding = model.get_parameter(model.embed_name)
    ids = trained.embed.index(embedding)
    read = model.trunk.embed(Packed.of([ids]))
    if not torch.equal(read, embedding.index_select(0, ids).to(model.dtype)):
        raise PluginError(
            "QC-MODEL-005",
            "is not what the trunk reads of a token, so that its rows cannot be trained",
            field=model.embed_name,
            fix="set trainable_token_indices to an empty list",
        )


def _check_magnitude(name: str, module: LoraLayer) -> None:
    """Stop the run where a row of a weight is zero: DoRA divides by its norm."""
    magnitude = module.lora_magnitude_vector
    assert magnitude is not None
    if zeros := int((magnitude == 0).sum()):
        raise NumericError(
            "QC-TRAIN-014",
            "has rows of zeros, and DoRA divides each row by its norm",
            field=name,
            found=f"{zeros} rows of {len(magnitude)}",
            expected="none",
            fix="set use_dora=false, or leave the group of this weight out of target_groups",
        )


def _targets(run: Run) -> tuple[Mapping[str, Lora], Namespace]:
    """LoRA by canonical name of the weight, and the class that the adapter is written for."""
    layout, settings = run.model.layout, run.settings
    classes = classes_of(run.model.checkpoint.config)
    chosen = lora_targets(layout, settings, classes)
    touched = {layout.table[name].part.name for name in chosen}
    return chosen, choose_class(layout, touched, classes, settings.adapter_class)


def _stream(run: Run, model: Model, stop: StopSignals) -> dict[str, str]:
    """Fill the model; returns the SHA-256 of the base's tensors by canonical name."""
    layout, checkpoint = run.model.layout, run.model.checkpoint
    size = sum(
        place.header.end - place.header.start
        for located in layout.located.values()
        if layout.loads(located.tensor.part)
        for place in located.places
    )
    if model.sharded is not None:
        size = share_of_bytes(model.sharded, layout)
    constant: list[tuple[str, float]] = []
    with run.reporter.progress("loading the base", size, "bytes") as advance:
        read = load if model.sharded is None else partial(load_shards, model.sharded, stop=stop)
        digests = read(
            model, layout, checkpoint, device=run.device, quantize=_quantizes(run),
            progress=advance,
            constant=lambda name, value: constant.append((name, value)),
        )  # fmt: skip
    if constant:
        shown = ", ".join(f"{name} is {value:g}" for name, value in constant[:3])
        more = f" and {len(constant) - 3} more" if len(constant) > 3 else ""
        run.reporter.warning(
            f"{len(constant)} weights of the base are constant, as if they were never trained: "
            f"{shown}{more}"
        )
    return digests


def _quantizes(run: Run) -> bool:
    return run.settings.quantization == "nf4"


def _check_four_bit(model: Model, base: Identified, lines: list[Coverage]) -> str:
    """Stop the run where a weight that the table declares 4-bit is held otherwise."""
    for tensor in base.layout.table:
        if base.layout.loads(tensor.part) and base.layout.held(tensor.name) is Store.NF4:
            holder = model.lora_layers.get(tensor.name)
            if holder is None or not holder.four_bit:
                raise NumericError(
                    "QC-TRAIN-005",
                    "is declared 4-bit and is not",
                    field=tensor.name,
                    fix="report this, or pass --set quantization=none",
                )
    four = sum(line.four_bit for line in lines)
    whole = sum(line.parameters for line in lines)
    return f"{100 * four / whole:.1f} % of the loaded parameters are held in 4 bit"
