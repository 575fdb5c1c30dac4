"""Hooks of the Qwen 3.5 plugin (describe, detect, parameters, ...): calls to other modules.

Importing this file imports no torch: blocks and tiny checkpoints are built by functions that import
it when they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcore import hookimpl
from qcore.api import (
    AdapterClaim,
    Architecture,
    ChatFormat,
    Claim,
    Finding,
    Generation,
    Kernel,
    Op,
    Part,
    PreflightRequest,
)

from . import adapter_layouts, chat, detect, guards, kernels, table

if TYPE_CHECKING:
    from qcore.api import BuildContext, CheckpointView, Trunk


def _build(context: BuildContext) -> Trunk:
    from .model import build

    return build(context)


def _tiny(folder: Path) -> None:
    from .tiny import write

    write(folder)


def _tiny_moe(folder: Path) -> None:
    from .tiny import write

    write(folder, moe=True)


DENSE = Architecture(
    name=detect.ARCHITECTURE,
    model_types=("qwen3_5", "qwen3_5_text"),
    root=table.ROOT,
    build=_build,
    tiny=_tiny,
    media_plugin="qcore-multimodal",
)

MOE = Architecture(
    name=detect.MOE,
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    root=table.ROOT,
    build=_build,
    tiny=_tiny_moe,
    media_plugin="qcore-multimodal",
)

GENERATION = Generation(
    name=detect.GENERATION,
    architectures=(DENSE.name, MOE.name),
    template_hashes=tuple(detect.TEMPLATE_HASHES),
    template_inputs=detect.TEMPLATE_INPUTS,
)


@hookimpl
def qcore_describe() -> Iterator[Architecture | Generation]:
    """The dense architecture, the mixture of experts, and the generation."""
    yield from (DENSE, MOE, GENERATION)


@hookimpl
def qcore_detect(checkpoint: CheckpointView) -> Iterator[Claim]:
    """The claim of Qwen 3.5."""
    yield from detect.claims(checkpoint)


@hookimpl
def qcore_parameters(architecture: str, config: Mapping[str, Any]) -> Iterator[Part]:
    """The text model and its multi-token prediction layers."""
    if architecture in (DENSE.name, MOE.name):
        yield from table.parts(config, moe=architecture == MOE.name)


@hookimpl
def qcore_preflight(request: PreflightRequest) -> Iterator[Finding]:
    """Preflight findings about the config and the template switches."""
    if request.architecture in (DENSE.name, MOE.name):
        yield from guards.findings(request)
    if request.generation == GENERATION.name:
        yield from chat.findings(request)


@hookimpl
def qcore_chat_format(generation: str, checkpoint: CheckpointView) -> Iterator[ChatFormat]:
    """The chat format of Qwen 3.5."""
    if generation == GENERATION.name:
        yield chat.QWEN35


@hookimpl
def qcore_adapter_layouts(
    adapter: Mapping[str, tuple[int, ...]], checkpoint: CheckpointView
) -> Iterator[AdapterClaim]:
    """Adapters whose modules are parts of weights, as other trainers write them."""
    architecture = detect.ARCHITECTURES.get(str(checkpoint.config.get("model_type")))
    if architecture is not None:
        config = checkpoint.config
        yield from adapter_layouts.claims(adapter, config, moe=architecture == detect.MOE)


@hookimpl
def qcore_kernels() -> Iterator[Op | Kernel]:
    """The ops of the blocks and their backends."""
    yield from kernels.ops()
    yield from kernels.kernels()
