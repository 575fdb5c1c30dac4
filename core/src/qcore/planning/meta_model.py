"""The model on the meta device, with storage exactly as it will be loaded.

This file decides which backends a plan assumes when none can be verified, and that weights are
stored as `qcore.nn.load` stores them, 4-bit ones in bitsandbytes' layout. `qcore.planning.measure`
measures a step of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..api.parameters import Store
from ..checkpoint.layout import Located
from ..errors import Failure, contained
from ..nn.kernels.cache import version_of
from ..nn.kernels.judge import cannot_run, raised
from ..nn.kernels.registry import REFERENCE, Listed
from ..nn.load import DTYPES as STORED
from ..nn.load import place
from ..nn.model import Model, Numbers
from ..nn.moe.experts import Experts
from ..nn.optim import FlatAdamW
from ..nn.qlora.linear import Linear
from ..nn.qlora.lora_layer import LoraLayer
from ..nn.qlora.nf4 import BLOCK, BLOCK2, NF4, NF4Stack, _functional
from ..plugins.resolve_model import Identified

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class PlannedBackends:
    """The backends of a plan: op to backend, and the functions."""

    backends: Mapping[str, str]
    functions: Mapping[str, Callable[..., Any]]
    absent: tuple[str, ...]

    def wrapped(
        self, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]
    ) -> PlannedBackends:
        """The same, each function wrapped."""
        functions = {op: wrap(op, function) for op, function in self.functions.items()}
        return PlannedBackends(self.backends, functions, self.absent)

    def get(self, op: str) -> Callable[..., Any] | None:
        """The function, or ``None``: the op's reference."""
        return self.functions.get(op)


def choose_backends(
    kernels: Sequence[Listed],
    device: str,
    wanted: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
) -> PlannedBackends:
    """The backends that a run on `device` would take if all of them pass there.

    Args:
        kernels: what `kernels.installed` gave.
        device: ``cuda`` or ``cpu``.
        wanted: full name of an op to backend, as asked for or as a run has chosen.
        config: config.json of the model; a backend that cannot compute it is not taken.

    Raises:
        UsageError: ``QC-KERNEL-003`` for a backend that was asked for and cannot compute the
            model.
        PluginError: ``QC-KERNEL-005`` for one that fails when it is asked.
    """
    backends: dict[str, str] = {}
    functions: dict[str, Callable[..., Any]] = {}
    absent = []
    for op in dict.fromkeys(one.kernel.op for one in kernels):
        backends[op] = REFERENCE
        for one in kernels:
            kernel = one.kernel
            if kernel.op != op:
                continue
            asked = wanted.get(op)
            if asked is None and (device == "cpu" or kernel.priority <= 0):
                continue
            if asked is not None and asked != kernel.backend:
                continue
            if not _computes(one, config, asked=asked is not None):
                continue
            if kernel.plan is None and not all(_installed(text) for text in kernel.requires):
                absent.append(f"{op}={kernel.backend}")
                continue
            backends[op], functions[op] = kernel.backend, (kernel.plan or kernel.load)()
            break
    return PlannedBackends(backends, functions, tuple(absent))


def _computes(one: Listed, config: Mapping[str, Any] | None, *, asked: bool) -> bool:
    """Whether a backend has code for this model, as it says itself."""
    reason = None if config is None else contained(partial(one.kernel.refuse_model, config))
    if reason is None:
        return True
    if isinstance(reason, Failure):
        raise raised(one, reason)
    if asked:
        raise cannot_run(one, reason)
    return False


def _installed(text: str) -> bool:
    from packaging.requirements import Requirement

    wanted = Requirement(text)
    version = version_of(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def meta_model(
    found: Identified,
    dtype: torch.dtype,
    lora: Numbers,
    backends: PlannedBackends,
    *,
    quantize: bool,
    device: str,
) -> tuple[Model, object]:
    """The model, filled, and its optimizer as `loop` makes it; adapters have gradients."""
    layout = found.layout
    model = Model(
        found.decision.architecture, found.checkpoint.config, layout, dtype, lora, backends,
        modality=found.modality,
    )  # fmt: skip
    modules = dict(model.named_modules())
    for item in layout.located.values():
        here = layout.loads(item.tensor.part) and item.tied is None
        if here and item.tensor.name not in layout.ties:
            _fill(model, modules, item, quantize and layout.store(item.tensor.row) is Store.NF4)
    adapters = [module for _, module in model.adapters()]
    for module in adapters:
        assert module.lora is not None
        shapes = module.lora_shapes(module.lora.r)
        module.set_lora(*(torch.empty(shape, device=META) for shape in shapes), trained=True)
    model.train()
    if device == "cuda":
        return model, FlatAdamW(adapters, lr=0.0, weight_decay=0.0)
    moments = []
    for _, parameter in model.trainable():
        parameter.grad, *both = (torch.empty(parameter.shape, device=META) for _ in range(3))
        moments.append(both)
    return model, moments


def _fill(model: Model, modules: Mapping[str, nn.Module], item: Located, quantize: bool) -> None:
    entry = item.tensor
    holder = model.lora_layers.get(entry.name)
    if holder is not None and quantize:
        _hold_codes(holder, model.dtype)
        return
    dtype = STORED.get(item.dtype, torch.bfloat16)  # block FP8 is decoded to it
    value = torch.empty(entry.shape, dtype=dtype, device=META)
    place(model, modules, item, slice(0, entry.shape[0]), value, quantize=False)


def _hold_codes(holder: LoraLayer, dtype: torch.dtype) -> None:
    """4-bit codes and scales of no value."""
    if isinstance(holder, Experts):
        shape = cast(tuple[int, int, int], holder.shape)
        stack = NF4Stack(shape, dtype, META, holder.dequantize)
        stack.code2 = torch.empty(256, device=META)
        holder.nf4, holder.weight, holder._taken = stack, None, shape[0]
        return
    assert isinstance(holder, Linear)
    functional = _functional()
    size = math.prod(holder.shape)
    blocks = math.ceil(size / BLOCK)
    codes = NF4.__new__(NF4)
    codes.shape, codes.read = holder.shape, holder.dequantize
    codes.packed = torch.empty(math.ceil(size / 2), 1, dtype=torch.uint8, device=META)
    scales = functional.QuantState(
        absmax=torch.empty(math.ceil(blocks / BLOCK2), device=META),
        code=torch.empty(256, device=META),
        blocksize=BLOCK2,
        dtype=torch.float32,
    )
    codes.state = functional.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=META),
        shape=torch.Size(holder.shape),
        code=torch.empty(16, device=META),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device=META),
        state2=scales,
    )
    holder.nf4, holder.weight = codes, None
