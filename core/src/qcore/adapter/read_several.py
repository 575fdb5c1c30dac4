"""Reads the adapters of a run, each with its weight.

This file decides that a weight is a finite number other than 0, and that the tokenizer of one
adapter can be taken, not those of several. `qcore.adapter.combined` adds the adapters.

Codes: ``QC-ADAPTER-019`` a weight that is not such a number, or no adapter; ``QC-MERGE-013``
several adapters with ``--take-tokenizer``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UsageError
from ..plugins.resolve_model import Identified
from .combined import Weighted
from .evidence import read_for
from .peft_names import Adapter
from .tied_head import untied_together


def read_adapters(
    base: Identified,
    wanted: str | Path | Mapping[str, float],
    *,
    trust_base: bool,
    trust_generation: bool,
    grow: bool = False,
) -> list[Weighted]:
    """Read the adapters of a run.

    Args:
        base: the base.
        wanted: one adapter, or the weight of each, by folder or hub id.
        trust_base: accept adapters without a fingerprint of their base.
        trust_generation: accept such adapters if they name a base of another generation.
        grow: accept rows of embedding and head that the base lacks.

    Raises:
        UsageError: ``QC-ADAPTER-019`` no adapter, one that is named twice, or a weight that is 0
            or not finite.
        QcoreError: as `read_for`.
    """
    if not isinstance(wanted, Mapping):
        wanted = {str(wanted): 1.0}
    for source, weight in wanted.items():
        if not math.isfinite(weight) or weight == 0:
            raise UsageError(
                "QC-ADAPTER-019", "has an invalid weight",
                field=source, found=weight, expected="a finite number other than 0",
                fix="leave the adapter out, or correct its weight",
            )  # fmt: skip
    if not wanted:
        raise UsageError("QC-ADAPTER-019", "names no adapter", field="adapter", fix="name one")
    adapters = [
        read_for(base, source, trust_base=trust_base, trust_generation=trust_generation, grow=grow)
        for source in wanted
    ]
    _refuse_twice(adapters)
    adapters = untied_together(adapters, base.layout)
    weights = map(float, wanted.values())
    return [
        Weighted(adapter=adapter, weight=weight)
        for adapter, weight in zip(adapters, weights, strict=True)
    ]


def _refuse_twice(adapters: Sequence[Adapter]) -> None:
    """Refuse a folder under two names."""
    folders: set[Path] = set()
    for adapter in adapters:
        if (folder := adapter.path.resolve()) in folders:
            raise UsageError(
                "QC-ADAPTER-019", "is named twice", field=adapter.source, found=folder,
                expected="each adapter once", fix="name it once, with the sum of the weights",
            )  # fmt: skip
        folders.add(folder)


def one_of(adapters: Sequence[Weighted]) -> Path:
    """Return the folder of the only adapter, whose tokenizer a run may take.

    Raises:
        UsageError: ``QC-MERGE-013`` there are several.
    """
    if len(adapters) > 1:
        raise UsageError(
            "QC-MERGE-013", "takes the tokenizer of one adapter", field="--take-tokenizer",
            found=f"{len(adapters)} adapters", expected="one",
            fix="merge the adapter that brings it alone, and the others into the result",
        )  # fmt: skip
    return adapters[0].adapter.path
