"""`qcore adapter diff`: which config fields, tensors and deltas of two adapters differ.

This file decides when two adapters are the same: ``identical`` if every tensor has the same values
and every field that acts is equal; ``equivalent`` if their deltas differ by no more than rounding
of float32, which another factorization of the same deltas, another alpha or another dtype leaves;
else ``different``. Deltas are compared by `qcore.adapter.norms`, a module at a time. Names are
compared without the wrappers of trainers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ..checkpoint.checkpoint import Header
from .contents import Contents, FilePair, config_differences, read_contents
from .norms import delta_norm, difference_norm, read_value
from .peft_config import DESCRIPTIVE
from .wrapped_names import plain_name

#: Relative difference of deltas that two factorizations in float32 may have.
ROUNDING: Final = 1e-6
#: Fields of which any value gives the same deltas where the deltas themselves are compared.
_IN_DELTAS: Final = frozenset(
    ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
     "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
     "init_lora_weights")
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """A tensor that only one adapter has, or that differs.

    Attributes:
        name: name without wrappers.
        what: ``only in a``, ``only in b``, ``shape``, ``dtype`` or ``values``.
        a: shape and dtype in the first adapter; ``None`` if it lacks the tensor.
        b: the same for the second.
        largest: largest absolute difference of values; ``None`` unless the values were compared.
    """

    name: str
    what: str
    a: str | None
    b: str | None
    largest: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaDifference:
    """The deltas of one module in two adapters.

    Attributes:
        module: name of the module.
        a: norm in the first adapter; 0 if it lacks the module, ``None`` if it is not known.
        b: the same for the second.
        difference: norm of the difference; ``None`` if it is not known.
    """

    module: str
    a: float | None
    b: float | None
    difference: float | None

    @property
    def relative(self) -> float | None:
        """The difference over the larger norm; 0 where both are 0, ``None`` if not known."""
        if self.a is None or self.b is None or self.difference is None:
            return None
        return self.difference / max(self.a, self.b) if max(self.a, self.b) else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterComparison:
    """The result of `compare_adapters`.

    Attributes:
        a: the first adapter as the user named it.
        b: the second.
        tensors: number of tensors that both have.
        fields: fields of adapter_config.json that differ, with both values.
        differing: the tensors that differ.
        deltas: every module that has a pair in one of them.
    """

    a: str
    b: str
    tensors: int
    fields: Mapping[str, tuple[Any, Any]]
    differing: tuple[TensorDifference, ...]
    deltas: tuple[DeltaDifference, ...]

    @property
    def acting(self) -> list[str]:
        """The differing fields that act beside the deltas."""
        return [field for field in self.fields if field not in DESCRIPTIVE | _IN_DELTAS]

    @property
    def relative(self) -> float | None:
        """The difference of all deltas together over the larger norm; ``None`` if not known."""
        parts = [(delta.a, delta.b, delta.difference) for delta in self.deltas]
        norms = [(a, b, d) for a, b, d in parts if None not in (a, b, d)]
        if len(norms) < len(parts):
            return None
        a, b, d = (math.hypot(*(float(n[i] or 0) for n in norms)) for i in range(3))
        return d / max(a, b) if max(a, b) else 0.0

    @property
    def verdict(self) -> str:
        """``identical``, ``equivalent`` or ``different`` (see the module)."""
        fields = [field for field in self.fields if field not in DESCRIPTIVE]
        if not self.differing and not fields:
            return "identical"
        others = [t for t in self.differing if ".lora_A" not in t.name and ".lora_B" not in t.name]
        others = [t for t in others if ".lora_embedding_" not in t.name]
        known = [delta.relative for delta in self.deltas]
        close = all(value is not None and value <= ROUNDING for value in known)
        return "equivalent" if close and not others and not self.acting else "different"

    def as_json(self) -> dict[str, Any]:
        """Return the payload of ``qcore adapter diff --json``."""
        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "relative_difference": self.relative,
            "tensors": self.tensors,
            "fields": [
                {"field": field, "a": a, "b": b, "acts": field not in DESCRIPTIVE}
                for field, (a, b) in self.fields.items()
            ],
            "differing": [
                {"name": t.name, "what": t.what, "a": t.a, "b": t.b, "largest": t.largest}
                for t in self.differing
            ],
            "deltas": [
                {"module": d.module, "a": d.a, "b": d.b, "difference": d.difference,
                 "relative": d.relative}
                for d in self.deltas
            ],
        }  # fmt: skip


def compare_adapters(a: str | Path, b: str | Path) -> AdapterComparison:
    """Compare two adapters, without a base.

    Args:
        a: a folder or hub id.
        b: another.

    Raises:
        InputError: as `read_contents`.
        NumericError: ``QC-MERGE-003`` a tensor is not finite.
    """
    one, other = read_contents(a), read_contents(b)
    differing = _tensors(one, other)
    return AdapterComparison(
        a=one.source,
        b=other.source,
        tensors=len(one.headers.keys() & other.headers.keys()),
        fields={
            field: (mine, theirs)
            for field, mine, theirs in config_differences(one.config, other.config)
        },
        differing=tuple(differing),
        deltas=tuple(_deltas(one, other, {difference.name for difference in differing})),
    )


def _tensors(one: Contents, other: Contents) -> list[TensorDifference]:
    found = []
    for name in sorted(one.headers.keys() | other.headers.keys()):
        mine, theirs = one.headers.get(name), other.headers.get(name)
        what, largest = "values", None
        if mine is None or theirs is None:
            what = "only in b" if mine is None else "only in a"
        elif mine.shape != theirs.shape:
            what = "shape"
        else:
            largest = _largest(read_value(one.path, mine), read_value(other.path, theirs))
            if not largest and mine.dtype == theirs.dtype:
                continue
            what = "values" if largest else "dtype"
        found.append(
            TensorDifference(name=name, what=what, a=_form(mine), b=_form(theirs), largest=largest)
        )
    return found


def _form(header: Header | None) -> str | None:
    return None if header is None else f"{header.dtype} {list(header.shape)}"


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest absolute difference of two tensors of one shape."""
    if one.dtype == other.dtype and torch.equal(one, other):
        return 0.0
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def _deltas(one: Contents, other: Contents, differing: set[str]) -> Iterable[DeltaDifference]:
    for module in sorted(one.pairs.keys() | other.pairs.keys()):
        mine, theirs = one.pairs.get(module), other.pairs.get(module)
        a = 0.0 if mine is None else delta_norm(one.path, mine)
        b = 0.0 if theirs is None else delta_norm(other.path, theirs)
        if mine is None or theirs is None:
            difference = b if mine is None else a
        elif mine.scaling == theirs.scaling and not _names(mine, theirs) & differing:
            difference = None if a is None else 0.0
        else:
            difference = difference_norm(one.path, mine, other.path, theirs)
        yield DeltaDifference(module=module, a=a, b=b, difference=difference)


def _names(mine: FilePair, theirs: FilePair) -> set[str]:
    return {plain_name(h.name) for pair in (mine, theirs) for h in (pair.a, pair.b)}
