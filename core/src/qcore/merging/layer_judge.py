"""How far the outputs of base + adapter and of the merge may differ, layer by layer.

This file decides the bound: float32 summed in another order, as a share of what the layer adds and
of its output. A token in which the layer amplifies rounding (`amplification`) may differ by so many
times more, and by no more than that, so that a fault in a single token is refused. A token that
rounding sends to other experts is counted and not compared. `qcore.merging.streams` runs the
layers.

Codes: ``QC-MERGE-003`` values that are not finite, ``-005`` a layer computes other values.

Shapes: T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..errors import NumericError

#: Allowed share of what a layer adds, and of its output.
_ADDED, _OUTPUT = 1e-5, 1e-6
#: Share of tokens that rounding may send to other experts in a layer; more is a fault.
_REROUTED = 0.1


class LayerJudge:
    """Compares outputs, and keeps the largest difference.

    Args:
        adapter: the adapter folder, for errors.

    Attributes:
        worst: the largest difference of a layer, as a share of what is allowed.
        rerouted: tokens that were sent to other experts, over all layers.
    """

    def __init__(self, adapter: Path) -> None:
        self._adapter = adapter
        self.worst = 0.0
        self.rerouted = 0

    def layer(
        self,
        prefix: str,
        x: Tensor,
        adapted: Tensor,
        merged: Tensor,
        moved: Tensor | None,
        amplified: Callable[[], Tensor] | None = None,
    ) -> None:
        """Compare the outputs ``[T, H]`` of a layer with adapter and merged, from the same `x`.

        The last layer of a tower may return fewer rows than it reads; then its whole output is what
        it adds.

        Args:
            prefix: the layer, for errors.
            x: its input.
            adapted: its output with the adapter.
            merged: its output with merged weights.
            moved: tokens that changed experts ``[T]``; ``None`` without experts.
            amplified: how many times more than most tokens each may differ ``[T]``; called only if
                a token differs by more than the plain bound.

        Raises:
            NumericError: ``QC-MERGE-003``, ``-005``.
        """
        if not bool(adapted.isfinite().all()):
            raise NumericError(
                "QC-MERGE-003",
                "gives values that are not finite",
                file=self._adapter,
                field=prefix,
                fix="train again with a lower learning_rate",
            )
        off = (merged - adapted).abs().amax(1)
        if moved is not None and int(moved.sum()) <= len(x) * _REROUTED:
            self.rerouted += int(moved.sum())
            off = off.masked_fill(moved, 0)
        added = adapted - x if adapted.shape == x.shape else adapted
        largest, size = float(added.abs().max()), float(adapted.abs().max())
        if amplified is not None and not float(off.max()) <= _allowed(largest, size):
            off = off / amplified()
        self.judge(prefix, float(off.max()), largest, size)

    def judge(self, where: str, worst: float, added: float, size: float) -> None:
        """Refuse a difference that rounding does not explain.

        Args:
            where: the layer, or the weight.
            worst: the largest difference between merge and base + adapter, over the amplification
                of its token.
            added: the largest value that the layer adds.
            size: the largest output.

        Raises:
            NumericError: ``QC-MERGE-005``.
        """
        allowed = _allowed(added, size)
        if not worst <= allowed:
            raise NumericError(
                "QC-MERGE-005",
                "computes other values than base + adapter",
                file=self._adapter,
                field=where,
                found=f"{worst:.2e}",
                expected=f"<= {allowed:.2e}",
                fix="report this: the adapter would not do in the merge what it did in training",
            )
        self.worst = max(self.worst, worst / allowed if allowed else 0.0)


def _allowed(added: float, size: float) -> float:
    return _ADDED * added + _OUTPUT * size
