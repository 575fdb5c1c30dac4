"""The hooks: questions with many answers. One decorated function a hook, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

from .parameters import Part
from .records import (
    AdapterClaim,
    Architecture,
    ChatFormat,
    Claim,
    Finding,
    Generation,
    Kernel,
    Modality,
    Op,
    PreflightRequest,
)

if TYPE_CHECKING:
    from ..checkpoint.checkpoint import Checkpoint

hookspec = pluggy.HookspecMarker("qcore")
hookimpl = pluggy.HookimplMarker("qcore")


@hookspec
def qcore_describe() -> Iterable[Architecture | Generation | Modality]:
    """Yield what this plugin brings."""
    raise NotImplementedError


@hookspec
def qcore_detect(checkpoint: Checkpoint) -> Iterable[Claim]:
    """Yield one claim per generation that the checkpoint may be, with signs and bars."""
    raise NotImplementedError


@hookspec
def qcore_key_mapping(architecture: str, config: Mapping[str, Any]) -> Iterable[Part]:
    """Yield the parts of the parameter table that this plugin owns for the config."""
    raise NotImplementedError


@hookspec
def qcore_preflight(request: PreflightRequest) -> Iterable[Finding]:
    """Yield everything that is wrong or worth saying before a verb starts."""
    raise NotImplementedError


@hookspec
def qcore_chat_format(generation: str, checkpoint: Checkpoint) -> Iterable[ChatFormat]:
    """Yield the chat format of a generation that this plugin describes."""
    raise NotImplementedError


@hookspec
def qcore_detect_merge(
    adapter: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint
) -> Iterable[AdapterClaim]:
    """Yield a claim for an adapter (shapes by tensor name) that is not in PEFT's layout."""
    raise NotImplementedError


@hookspec
def qcore_kernels() -> Iterable[Op | Kernel]:
    """Yield the ops of this plugin's blocks, and the backends that it has for ops."""
    raise NotImplementedError


@hookspec
def qcore_doctor() -> Iterable[Finding]:
    """Yield what this plugin has to say about the environment."""
    raise NotImplementedError
