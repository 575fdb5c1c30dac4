"""The hook implementations of Qwen 3.6, each one line to the module that decides.

Tables, blocks and tiny checkpoints are those of the architectures, which qcore-qwen35 brings;
a generation adds what changes without a tensor changing. Importing this file imports no torch.
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
    """The generation."""
    yield GENERATION


@hookimpl
def qcore_detect(checkpoint: CheckpointView) -> Iterator[Claim]:
    """The claim of 3.6."""
    yield from detect.claims(checkpoint)


@hookimpl
def qcore_preflight(request: PreflightRequest) -> Iterator[Finding]:
    """The guards."""
    if request.generation == GENERATION.name:
        yield from guards.findings(request)


@hookimpl
def qcore_chat_format(generation: str, checkpoint: CheckpointView) -> Iterator[ChatFormat]:
    """Turns and thinking of 3.6."""
    if generation == GENERATION.name:
        yield chat.QWEN36
