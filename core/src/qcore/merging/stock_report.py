"""The report of a comparison with stock: one row a prompt, and what differs.

This file decides which numbers a prompt has (largest difference, KL divergence, top-1 agreement,
the adapter's effect) and the keys of ``--json``. `against_stock` decides what counts as different.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import QcoreError
from .stock_compare import Pass


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptResult:
    """The comparison of one prompt, over its last positions.

    Attributes:
        name: of the prompt.
        tokens: its length.
        difference: largest absolute difference of logits.
        bound: what is allowed.
        kl: mean KL divergence of ours from stock's distribution, in nats.
        top1: share of positions with the same most likely token.
        effect: largest absolute effect of the adapter on stock's logits; ``None`` without one.
        effect_ratio: our effect along stock's: 1 where they are equal.
        rerouted: whether rounding sent a token to another expert; then only layers are judged.
    """

    name: str
    tokens: int
    difference: float
    bound: float
    kl: float
    top1: float
    effect: float | None
    effect_ratio: float | None
    rerouted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StockReport:
    """The result of `verify_against_stock`.

    Attributes:
        folder: what was verified.
        kind: ``base``, ``merged`` or ``adapter``.
        stock_class: the class of transformers.
        packages: versions of transformers and peft.
        dtype: in which both sides computed.
        whole: whether the stock model was in memory as a whole.
        prompts: one result a prompt.
        layers: the largest difference of a layer as a share of what is allowed, and its name.
        notes: what was not compared, and why.
        problems: what differs; empty where nothing does.
    """

    folder: Path
    kind: str
    stock_class: str
    packages: Mapping[str, str]
    dtype: str
    whole: bool
    prompts: tuple[PromptResult, ...]
    layers: Mapping[str, Any]
    notes: tuple[str, ...]
    problems: tuple[QcoreError, ...]

    @property
    def ok(self) -> bool:
        """Whether both sides agree."""
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """The payload of ``qcore verify --against stock --json``."""
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "against": "stock",
            "ok": self.ok,
            "stock_class": self.stock_class,
            "packages": dict(self.packages),
            "dtype": self.dtype,
            "whole": self.whole,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "layers": dict(self.layers),
            "notes": list(self.notes),
            "problems": [problem.as_json() for problem in self.problems],
        }


def prompt_result(
    name: str, ids: Tensor, main: Pass, without: Pass | None, number: int
) -> PromptResult:
    """The numbers of one prompt.

    Args:
        name: of the prompt.
        ids: its tokens ``[T]``.
        main: the pass with the adapter, or of the folder alone.
        without: the pass without the adapter; ``None`` without one.
        number: of the prompt in the passes.
    """
    stock, ours = main.stock[number].double(), main.ours[number].double()
    log_p, log_q = stock.log_softmax(-1), ours.log_softmax(-1)
    effect = ratio = None
    if without is not None:
        theirs = stock - without.stock[number].double()
        mine = ours - without.ours[number].double()
        effect = float(theirs.abs().max())
        size = float((theirs * theirs).sum())
        ratio = float((mine * theirs).sum()) / size if size > 0 else None
    return PromptResult(
        name=name,
        tokens=len(ids),
        difference=float((ours - stock).abs().max()),
        bound=main.bounds[number],
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        top1=float((stock.argmax(-1) == ours.argmax(-1)).double().mean()),
        effect=effect,
        effect_ratio=ratio,
        rerouted=main.rerouted[number],
    )


def versions() -> dict[str, str]:
    """Versions of what computed."""
    return {name: version(name) for name in ("transformers", "peft", "torch")}
