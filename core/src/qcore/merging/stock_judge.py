"""Which difference between the stock class and qcore is a fault, and the error that names it.

This file decides that a layer, the logits of a prompt and the effect of the adapter on them must be
within their bounds, which `stock_compare` computes, and which of several faults is reported.

Codes: ``QC-STOCK-005`` a layer computes other values, ``-006`` logits or the effect differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import NumericError, QcoreError
from .stock_compare import Pass
from .stock_report import PromptResult


class Judge:
    """Collects the faults of one comparison.

    Args:
        path: the folder that is verified, for errors.

    Attributes:
        problems: the faults.
        notes: lines for the report.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.problems: list[QcoreError] = []
        self.notes: list[str] = []

    def layers(self, main: Pass, own: Pass | None, without: Pass | None) -> None:
        """Judge the layers: the first whose values are beyond their bound names the place.

        Args:
            main: the pass with the adapter, or of the folder alone.
            own: the pass of the merged folder under the stock class.
            without: the pass without the adapter.
        """
        for what, done in (("", own), ("", main), (" without the adapter", without)):
            if done is not None and done is not main and done.worst > 1:
                self._layer_problem(done, what)
        if main.worst > 1:
            self._layer_problem(main, "")
        if main.skipped:
            self.notes.append(
                f"{len(main.skipped)} layers are not compared, such as {main.skipped[0]}: rounding "
                "sends every token to other experts"
            )

    def prompts(self, main: Pass, without: Pass | None, results: Sequence[PromptResult]) -> None:
        """Judge the logits of each prompt, and the adapter's effect on them, up to a fault."""
        small = 0
        for number, result in enumerate(results):
            if result.rerouted:
                continue
            if not result.difference <= result.bound:
                self._logits_problem(result, result.difference, result.bound, "logits differ")
                return
            if without is None:
                continue
            effect = (main.ours[number] - without.ours[number]) - (
                main.stock[number] - without.stock[number]
            )
            bound = result.bound + without.bounds[number]
            if not (off := float(effect.abs().max())) <= bound:
                self._logits_problem(result, off, bound, "the adapter's effect differs")
                return
            small += result.effect is not None and result.effect <= bound
        if small:
            self.notes.append(f"the effect on {small} prompts is too small to tell from rounding")

    def _layer_problem(self, done: Pass, what: str) -> None:
        self._differs(
            "QC-STOCK-005",
            f"computes other values than the stock class{what}",
            done.layer,
            done.difference,
            done.allowed,
        )

    def _logits_problem(self, result: PromptResult, off: float, bound: float, what: str) -> None:
        self._differs(
            "QC-STOCK-006",
            f"{what} from those of stock transformers and PEFT",
            result.name,
            off,
            bound,
        )

    def _differs(self, code: str, what: str, field: str, found: float, bound: float) -> None:
        self.problems.append(
            NumericError(
                code,
                what,
                file=self._path,
                field=field,
                found=f"{found:.2e}",
                expected=f"<= {bound:.1e} (float32 in another order)",
                fix="restore the folder, or make it again",
            )
        )
