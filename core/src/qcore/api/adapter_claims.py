"""Records of `qcore_adapter_layouts`: which weights the tensors of a foreign adapter change.

This file decides what a plugin can say of an adapter: tensors by other names, and modules that are
parts of weights. `qcore.adapter.claimed_layout` and `qcore.adapter.piece_names` check it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPiece:
    """A module of an adapter that changes a part of a weight, or one of several weights.

    Its matrices are ``A [r, in]`` and ``B [n, r]``, or, for all experts of a stack,
    ``[experts, r, in]`` and ``[experts, n, r]``; a first size of 1 means that experts share them.

    Attributes:
        module: the name of its tensors before ``.lora_A.weight``.
        weight: canonical name of the weight.
        rows: first row of the weight, or of each expert, that it changes, and the row after the
            last; ``None`` for all rows.
        source: the rows of B that change them, likewise; ``None`` for all. A module of several
            weights needs them.
        expert: position in the stack of the only expert that it changes; ``None`` for all experts,
            and for a weight without experts.
    """

    module: str
    weight: str
    rows: tuple[int, int] | None = None
    source: tuple[int, int] | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterClaim:
    """An adapter layout other than PEFT's that a plugin can read.

    Tensors that a claim does not mention are read as PEFT's.

    Attributes:
        layout: its name, for the report.
        names: adapter tensor name -> canonical tensor name and side (``A`` or ``B``).
        pieces: modules that are not the module of one whole weight.
    """

    layout: str
    names: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    pieces: tuple[AdapterPiece, ...] = ()
