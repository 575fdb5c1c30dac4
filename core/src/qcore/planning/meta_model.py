"""Builds the model to plan on the meta device, with the backends and 4-bit storage of a real run.

This file decides which backends a plan assumes when none can be verified, and that weights are
stored as `qcore.nn.load` stores them, 4-bit ones in bitsandbytes' layout. `qcore.planning.measure`
measures a step of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..api.parameters import Store
from ..checkpoint.layout import Located
from ..config.settings import Settings
from ..errors import Failure, contained
from ..nn.device import DTYPES
from ..nn.kernels.cache import version_of
from ..nn.kernels.judge import cannot_run, raised
from ..nn.kernels.registry import REFERENCE, Listed, Used
from ..nn.load import DTYPES as STORED
from ..nn.load import place
from ..nn.model import Model, Numbers
from ..nn.moe.experts import Experts
from ..nn.optim import FlatAdamW
from ..nn.qlora.linear import Linear
from ..nn.qlora.lora_layer import Lora, LoraLayer
from ..nn.qlora.nf4 import BLOCK, BLOCK2, NF4, NF4Stack, functional
from ..nn.token_rows import TokenRows
from ..plugins.resolve_model import Identified

if TYPE_CHECKING:
    from .trace import Trace

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class PlannedBackends:
    """The kernel backends that a plan assumes.

    Attributes:
        backends: op -> name of the backend.
        functions: op -> function; ops that use the reference are left out.
        absent: ``op=backend`` for backends whose requirements are not installed here.
    """

    backends: Mapping[str, str]
    functions: Mapping[str, Callable[..., Any]]
    absent: tuple[str, ...]

    def wrapped(
        self, wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]
    ) -> PlannedBackends:
        """Return the same backends with each function wrapped; `wrap` gets op and function."""
        functions = {op: wrap(op, function) for op, function in self.functions.items()}
        return PlannedBackends(self.backends, functions, self.absent)

    def get(self, op: str) -> Callable[..., Any] | None:
        """Return the function of an op; ``None`` for the reference."""
        return self.functions.get(op)


def choose_backends(
    kernels: Sequence[Listed],
    device: str,
    requested: Mapping[str, str],
    used: Used,
) -> PlannedBackends:
    """Choose the backends that a run on `device` would use if all of them pass verification.

    Args:
        kernels: the installed kernels.
        device: ``cuda`` or ``cpu``.
        requested: op -> backend, from the settings or as a run has chosen.
        used: the model; ops that it does not use are left out, and a backend that cannot compute it
            is skipped.

    Raises:
        UsageError: ``QC-KERNEL-003`` a requested backend cannot compute the model.
        PluginError: ``QC-KERNEL-005`` a backend raises when it is asked whether it can, or when
            its function is loaded.
    """
    backends: dict[str, str] = {}
    functions: dict[str, Callable[..., Any]] = {}
    absent = []
    for op in dict.fromkeys(listed.kernel.op for listed in kernels):
        if op not in used.ops:
            continue
        backends[op] = REFERENCE
        for listed in kernels:
            kernel = listed.kernel
            if kernel.op != op:
                continue
            asked = requested.get(op)
            if asked is None and (device == "cpu" or kernel.priority <= 0):
                continue
            if asked is not None and asked != kernel.backend:
                continue
            if not _computes(listed, used.config, asked=asked is not None):
                continue
            if kernel.plan is None and not all(_installed(text) for text in kernel.requires):
                absent.append(f"{op}={kernel.backend}")
                continue
            backends[op], functions[op] = kernel.backend, _function(listed)
            break
    return PlannedBackends(backends, functions, tuple(absent))


def _computes(listed: Listed, config: Mapping[str, Any], *, asked: bool) -> bool:
    """Whether a backend supports the model, according to its `refuse_model`."""
    reason = contained(partial(listed.kernel.refuse_model, config))
    if reason is None:
        return True
    if isinstance(reason, Failure):
        raise raised(listed, reason)
    if asked:
        raise cannot_run(listed, reason)
    return False


def _function(listed: Listed) -> Callable[..., Any]:
    """The function that a plan runs on meta tensors in place of the backend's."""
    function = contained(listed.kernel.plan or listed.kernel.load)
    if isinstance(function, Failure):
        raise raised(listed, function)
    return function


def _installed(text: str) -> bool:
    from packaging.requirements import Requirement

    wanted = Requirement(text)
    version = version_of(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def meta_model(
    identified: Identified,
    dtype: torch.dtype,
    lora: Numbers,
    backends: PlannedBackends,
    *,
    quantize: bool,
    device: str,
    token_ids: Sequence[int] = (),
    head_token_ids: Sequence[int] = (),
) -> tuple[Model, object]:
    """Build the model on the meta device, with weights, gradients and optimizer state.

    Args:
        identified: the model; its headers are enough.
        dtype: compute dtype.
        lora: LoRA settings of each weight, by canonical name.
        backends: the kernel backends.
        quantize: whether weights that can be are stored in 4 bits.
        device: ``cuda`` or ``cpu``; decides which optimizer state the run would have.
        token_ids: rows of the embedding that are trained.
        head_token_ids: rows of the head that are trained.

    Returns:
        The model and its optimizer state.
    """
    layout = identified.layout
    model = Model(
        identified.decision.architecture,
        identified.checkpoint.config,
        layout,
        dtype,
        lora,
        backends,
        modality=identified.modality,
        token_ids=token_ids,
        head_token_ids=head_token_ids,
    )
    modules = dict(model.named_modules())
    for item in layout.located.values():
        is_stored = layout.loads(item.tensor.part) and item.tied is None
        if is_stored and item.tensor.name not in layout.ties:
            _fill(model, modules, item, quantize and layout.held(item.tensor.name) is Store.NF4)
    adapters = [module for _, module in model.adapters()]
    for module in adapters:
        assert module.lora is not None
        values = [torch.empty(factor.shape, device=META) for factor in module.factors]
        module.set_lora(*values, trained=True)
    for rows in [] if model.trained_rows is None else model.trained_rows.children():
        assert isinstance(rows, TokenRows)
        rows.reset(torch.empty(rows.trainable_tokens_delta.shape, device=META))
    model.train()
    if device == "cuda":
        return model, FlatAdamW(adapters, model.beside_adapters(), lr=0.0, weight_decay=0.0)
    moments = []
    for _, parameter in model.trainable():
        parameter.grad, *pair = (torch.empty(parameter.shape, device=META) for _ in range(3))
        moments.append(pair)
    return model, moments


def of_settings(
    identified: Identified,
    settings: Settings,
    lora: Mapping[str, Lora],
    taken: PlannedBackends,
    device: str,
    trace: Trace,
) -> tuple[Model, object]:
    """Build the model of a run with `meta_model`; a trace attributes allocations to ops."""
    return meta_model(
        identified, DTYPES[settings.dtype], lora, taken.wrapped(trace.named),
        quantize=settings.quantization == "nf4", device=device,
        token_ids=settings.trainable_token_indices,
        head_token_ids=settings.trainable_head_token_indices,
    )  # fmt: skip


def _fill(model: Model, modules: Mapping[str, nn.Module], item: Located, quantize: bool) -> None:
    entry = item.tensor
    layer = model.lora_layers.get(entry.name)
    if layer is not None and quantize:
        _set_empty_codes(layer, model.dtype)
        return
    dtype = STORED.get(item.dtype, torch.bfloat16)  # block FP8 is decoded to bfloat16
    value = torch.empty(entry.shape, dtype=dtype, device=META)
    place(model, modules, item, slice(0, entry.shape[0]), value, quantize=False)


def _set_empty_codes(layer: LoraLayer, dtype: torch.dtype) -> None:
    """Store 4-bit codes and scales without values, in bitsandbytes' layout."""
    if isinstance(layer, Experts):
        shape = cast(tuple[int, int, int], layer.shape)
        stack = NF4Stack(shape, dtype, META, layer.dequantize)
        stack.code2 = torch.empty(256, device=META)
        layer.nf4, layer.weight, layer._taken = stack, None, shape[0]
        return
    assert isinstance(layer, Linear)
    bnb = functional()
    size = math.prod(layer.shape)
    blocks = math.ceil(size / BLOCK)
    codes = NF4.__new__(NF4)
    codes.shape, codes.read = layer.shape, layer.dequantize
    codes.packed = torch.empty(math.ceil(size / 2), 1, dtype=torch.uint8, device=META)
    scales = bnb.QuantState(
        absmax=torch.empty(math.ceil(blocks / BLOCK2), device=META),
        code=torch.empty(256, device=META),
        blocksize=BLOCK2,
        dtype=torch.float32,
    )
    codes.state = bnb.QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=META),
        shape=torch.Size(layer.shape),
        code=torch.empty(16, device=META),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device=META),
        state2=scales,
    )
    layer.nf4, layer.weight = codes, None
