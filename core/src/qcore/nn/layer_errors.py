"""Errors of a plugin's layers: what a layer raises becomes an error of its plugin.

This file decides which exceptions of a running layer are its plugin's fault and how they are
reported. Errors of qcore (`QcoreError`), interrupts, and exceptions that mean that memory ran out
pass as they are. A guard is entered around each run of a layer, once for all of its ops, also where
it runs again in backward; who runs layers (`recompute.run_layers`, the decoder, the planner, the
proof of a merge) enters it.

Codes: ``QC-PLUGIN-002`` a layer raised.
"""

from __future__ import annotations

from types import TracebackType

from ..errors import PluginError, QcoreError, cause_of
from ..plugins.manager import Owner
from .device import is_out_of_memory


class LayerGuard:
    """Context in which one layer runs. It has no state, so it can be entered again and again.

    Args:
        owner: the plugin.
        layer: canonical name of the layer.
    """

    __slots__ = ("_layer", "_owner")

    def __init__(self, owner: Owner, layer: str) -> None:
        self._owner, self._layer = owner, layer

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
                f"{self._owner.name} failed in a layer",
                field=self._layer,
                found=cause_of(error),
                fix=self._owner.remedy,
            ) from error
