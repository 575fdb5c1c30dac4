"""Hooks of the image and video plugin (describe, parameters, preflight): calls to other modules.

Importing this file imports neither torch, transformers nor Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qcore import hookimpl
from qcore.api import Finding, Modality, Part, PreflightRequest
from qcore.errors import InputError

from . import guards, table
from .media import KINDS

if TYPE_CHECKING:
    from qcore.api import BuildContext, CheckpointView, MediaReader, Tower


def _build(context: BuildContext) -> Tower:
    from .tower import build

    return build(context)


def _reader(checkpoint: CheckpointView, report: Callable[[str], None]) -> MediaReader:
    from .reader import Reader

    return Reader(checkpoint, report)


VISION = Modality(
    name=table.NAME,
    section=table.SECTION,
    architectures=("qwen3_5", "qwen3_5_moe"),
    root=table.ROOT,
    kinds=KINDS,
    build=_build,
    reader=_reader,
)


@hookimpl
def qcore_describe() -> Iterator[Modality]:
    """The vision modality."""
    yield VISION


@hookimpl
def qcore_parameters(architecture: str, config: Mapping[str, Any]) -> Iterator[Part]:
    """The vision tower, if config.json describes one; otherwise `guards` reports the error."""
    if architecture in VISION.architectures and config.get(VISION.section) is not None:
        with suppress(InputError):
            yield from table.parts(config)


@hookimpl
def qcore_preflight(request: PreflightRequest) -> Iterator[Finding]:
    """Preflight findings about the vision tower and its tokens."""
    if request.architecture in VISION.architectures:
        yield from guards.findings(request)
