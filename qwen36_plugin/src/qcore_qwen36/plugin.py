"""Hooks of the Qwen 3.6 plugin (describe, detect, preflight, chat format): calls to other modules.

qcore-qwen35 provides the architectures with their tables, blocks and tiny checkpoints; a generation
adds what changes without a change of tensors. Importing this file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qcore import hookimpl
from qcore.api import ChatFormat, Claim, Finding, Generation, PreflightRequest
from qcore_qwen35.api import ARCHITECTURE, MOE

from . import chat, detect, guards

if TYPE_CHECKING:
    from qcore.api import CheckpointView

GENERATION = Generation(
    name=detect.GENERATION,
    architectures=(ARCHITECTURE, MOE),
    template_hashes=detect.TEMPLATE_HASHES,
    template_inputs=detect.TEMPLATE_INPUTS,
)


@hookimpl
def qcore_describe() -> Iterator[Generation]:
    """The generation Qwen 3.6."""
    yield GENERATION


@hookimpl
def qcore_detect(checkpoint: CheckpointView) -> Iterator[Claim]:
    """The claim of Qwen 3.6."""
    yield from detect.claims(checkpoint)


@hookimpl
def qcore_preflight(request: PreflightRequest) -> Iterator[Finding]:
    """Preflight findings about the template switches."""
    if request.generation == GENERATION.name:
        yield from guards.findings(request)


@hookimpl
def qcore_chat_format(generation: str, checkpoint: CheckpointView) -> Iterator[ChatFormat]:
    """The chat format of Qwen 3.6."""
    if generation == GENERATION.name:
        yield chat.QWEN36
