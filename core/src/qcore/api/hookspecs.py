"""Hook specifications for plugins (pluggy): name, arguments and answers of each ``qcore_*`` hook.

This file decides names, arguments and answers of hooks, one decorated function a hook and nothing
else. How they are called is decided by `qcore.plugins.manager`.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pluggy

from .adapter_claims import AdapterClaim
from .parameters import Part
from .records import (
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
from .views import CheckpointView

hookspec = pluggy.HookspecMarker("qcore")
hookimpl = pluggy.HookimplMarker("qcore")

#: Hooks of qcore 0.1 that have another name now; a plugin that implements one is invalid.
RENAMED = {
    "qcore_key_mapping": "qcore_parameters",
    "qcore_detect_merge": "qcore_adapter_layouts",
}


@hookspec
def qcore_describe() -> Iterable[Architecture | Generation | Modality]:
    """Yield what this plugin brings."""


@hookspec
def qcore_detect(checkpoint: CheckpointView) -> Iterable[Claim]:
    """Yield one claim per generation that the checkpoint may be, with its evidence."""


@hookspec
def qcore_parameters(architecture: str, config: Mapping[str, Any]) -> Iterable[Part]:
    """Yield the parts of the parameter table that this plugin owns for the config."""


@hookspec
def qcore_preflight(request: PreflightRequest) -> Iterable[Finding]:
    """Yield everything that is wrong or worth saying before a verb starts."""


@hookspec
def qcore_chat_format(generation: str, checkpoint: CheckpointView) -> Iterable[ChatFormat]:
    """Yield the chat format of a generation that this plugin describes."""


@hookspec
def qcore_adapter_layouts(
    adapter: Mapping[str, tuple[int, ...]], checkpoint: CheckpointView
) -> Iterable[AdapterClaim]:
    """Yield a claim for an adapter (shapes by tensor name) that is not in PEFT's layout."""


@hookspec
def qcore_kernels() -> Iterable[Op | Kernel]:
    """Yield the ops of this plugin's blocks, and the backends that it has for ops."""


@hookspec
def qcore_doctor() -> Iterable[Finding]:
    """Yield what this plugin has to say about the environment."""
