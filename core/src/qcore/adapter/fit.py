"""What of an adapter fits a base, as counts and names, without refusing the adapter.

This file decides how the tensors of an adapter are counted for a base: matched with a weight,
ignored because they have its values, or unmatched. `qcore.adapter.reader` matches them; the verbs
that use an adapter raise what is only listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import PreflightError, QcoreError
from ..plugins.resolve_model import Identified
from .contents import Contents
from .evidence import evidence_lines, read_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """An adapter on a base.

    Attributes:
        model: the base as the user named it.
        generation: generation of the base.
        matched: number of tensors that change a weight; ``None`` if they could not be matched.
        ignored: number of tensors that have the values of the base.
        unmatched: names of the other tensors.
        weights: number of weights that change.
        groups: group of the weight of each matched tensor, by the tensor's name in the file.
        ranks: rank and scaling of the LoRA pair of each matched tensor.
        lines: what the files say against the base, and how they were read.
        problems: what the verbs that use an adapter would raise.
    """

    model: str
    generation: str
    matched: int | None = None
    ignored: int = 0
    unmatched: tuple[str, ...] = ()
    weights: int = 0
    groups: Mapping[str, str]
    ranks: Mapping[str, tuple[int, float]]
    lines: tuple[str, ...] = ()
    problems: tuple[QcoreError, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the facts for ``--json``."""
        return {
            "model": self.model,
            "generation": self.generation,
            "matched": self.matched,
            "ignored": self.ignored,
            "unmatched": list(self.unmatched),
            "weights": self.weights,
            "notes": list(self.lines),
        }


def fit(contents: Contents, base: Identified, model: str) -> Fit:
    """Match the tensors of an adapter with the weights of a base.

    Consent is not asked for, because nothing is written.

    Args:
        contents: the adapter.
        base: the base.
        model: how the user named it.
    """
    generation = base.decision.generation.name
    problems: list[QcoreError] = []
    try:
        adapter = read_for(
            base, contents.source, trust_base=True, trust_generation=True, problems=problems
        )
    except PreflightError as error:
        problems += error.errors
    except QcoreError as error:
        problems.append(error)
    else:
        groups: dict[str, str] = {}
        ranks: dict[str, tuple[int, float]] = {}
        for change in adapter.changes.values():
            for header in change.headers:
                groups[header.name] = change.tensor.row.group
        for pair in adapter.pairs.values():
            for piece in pair.pieces:
                ranks |= {header.name: (piece.r, piece.scaling) for header in piece.headers}
        names = {header.name for header in contents.headers.values()}
        refused = {str(problem.field) for problem in problems}
        loose = sorted(names - groups.keys())
        unmatched = tuple(name for name in loose if name in refused)
        return Fit(
            model=model,
            generation=generation,
            matched=len(groups),
            ignored=len(loose) - len(unmatched),
            unmatched=unmatched,
            weights=len(adapter.changes),
            groups=groups,
            ranks=ranks,
            lines=tuple(evidence_lines(base, adapter)),
            problems=tuple(problems),
        )
    return Fit(model=model, generation=generation, groups={}, ranks={}, problems=tuple(problems))
