"""`Run`: the checked model, rows, settings, device and kernels of a run, as `setup` returns them.

It holds all that is known of a run before a weight is read. `setup` decides the checks that it has
passed, `train` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..api.media import MediaReader
from ..config.settings import Settings
from ..data.dataset import Dataset
from ..nn.kernels.registry import Chosen
from ..parallel.world import World
from ..plugins.resolve_model import Identified
from ..reporting import Reporter
from .initial_adapter import InitialAdapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run whose settings, rows and model fit each other.

    Attributes:
        model: the base, with its tower where the rows need it.
        data: the rows.
        summary: what manifests record of the rows (`Dataset.summary`).
        settings: the settings.
        device: where it computes.
        kernels: a backend for each op, verified on the device.
        reader: of the media in rows; ``None`` where this model reads none.
        target: the adapter folder that will be published.
        folder: the run folder, ``OUTPUT.run``.
        reporter: receives events.
        initial: the adapter that the run starts from; ``None``: the base alone.
        world: the ranks that share the run.
    """

    model: Identified
    data: Dataset
    summary: Mapping[str, Any]
    settings: Settings
    device: torch.device
    kernels: Chosen
    reader: MediaReader | None
    target: Path
    folder: Path
    reporter: Reporter
    initial: InitialAdapter | None = None
    world: World = field(default_factory=World.alone)
