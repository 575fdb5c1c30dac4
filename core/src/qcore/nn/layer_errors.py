"""Errors of a plugin's blocks: what a layer, a trunk or a tower raises names its plugin.

This file decides which exceptions of running blocks are their plugin's fault and how they are
reported. Errors of qcore (`QcoreError`), interrupts, and exceptions that mean that memory ran out
pass as they are. A guard is entered around each run of a layer, once for all of its ops, also where
it runs again in backward; the code that runs layers (`recompute.run_layers`, the decoder, the
planner, the proof of a merge) enters it. The other methods of trunk and tower are guarded by
`GuardedTrunk` and `GuardedTower`, through which core calls them.

Codes: ``QC-PLUGIN-002`` a block raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import cast

import torch
from torch import Tensor, nn

from ..api.blocks import Layer, Media, Packed, Tower, TowerLayer, Trunk
from ..errors import PluginError, QcoreError, cause_of
from ..plugins.manager import Owner
from .device import is_out_of_memory


class LayerGuard:
    """Context in which one layer runs. It has no state, so it can be entered again and again.

    Args:
        owner: the plugin.
        layer: canonical name of the layer, or of the module of another block.
        where: what fails, in words.
    """

    __slots__ = ("_layer", "_owner", "_where")

    def __init__(self, owner: Owner, layer: str, where: str = "a layer") -> None:
        self._owner, self._layer, self._where = owner, layer, where

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, QcoreError) or is_out_of_memory(error):
            return
        # As in hooks, sys.exit in a layer is a failure; an interrupt is the user's.
        if isinstance(error, Exception | SystemExit):
            raise PluginError(
                "QC-PLUGIN-002",
                f"{self._owner.name} failed in {self._where}",
                field=self._layer,
                found=cause_of(error),
                fix=self._owner.remedy,
            ) from error


class GuardedTrunk:
    """A `Trunk` that calls a plugin's; its layers are the plugin's own.

    Args:
        trunk: the plugin's, an ``nn.Module``.
        owner: the plugin.
        root: canonical name at which it is mounted.

    Attributes:
        module: the plugin's trunk.
    """

    def __init__(self, trunk: Trunk, owner: Owner, root: str) -> None:
        self.module = cast(nn.Module, trunk)
        self._trunk = trunk
        self._embed = LayerGuard(owner, root, "Trunk.embed")
        self._final = LayerGuard(owner, root, "Trunk.final")
        self._aux_loss = LayerGuard(owner, root, "Trunk.aux_loss")

    @property
    def layers(self) -> Sequence[Layer]:
        """See `Trunk.layers`."""
        return self._trunk.layers

    def embed(self, batch: Packed) -> Tensor:
        """See `Trunk.embed`."""
        with self._embed:
            return self._trunk.embed(batch)

    def final(self, x: Tensor) -> Tensor:
        """See `Trunk.final`."""
        with self._final:
            return self._trunk.final(x)

    def aux_loss(self, batch: Packed) -> Tensor | None:
        """See `Trunk.aux_loss`."""
        with self._aux_loss:
            return self._trunk.aux_loss(batch)


class GuardedTower:
    """A `Tower` that calls a plugin's; its layers are the plugin's own.

    Args:
        tower: the plugin's, an ``nn.Module``.
        owner: the plugin.
        root: canonical name at which it is mounted.

    Attributes:
        module: the plugin's tower.
    """

    def __init__(self, tower: Tower, owner: Owner, root: str) -> None:
        self.module = cast(nn.Module, tower)
        self._tower = tower
        self._embed = LayerGuard(owner, root, "Tower.embed")
        self._sample = LayerGuard(owner, root, "Tower.sample")

    @property
    def layers(self) -> Sequence[TowerLayer]:
        """See `Tower.layers`."""
        return self._tower.layers

    def embed(self, media: Media) -> Tensor:
        """See `Tower.embed`."""
        with self._embed:
            return self._tower.embed(media)

    def sample(
        self, units: int, device: torch.device, generator: torch.Generator | None = None
    ) -> Media:
        """See `Tower.sample`."""
        with self._sample:
            return self._tower.sample(units, device, generator)
