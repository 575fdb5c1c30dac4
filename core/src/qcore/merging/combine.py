"""`qcore adapter combine`: the weighted sum of adapters as one adapter.

This file decides what the sum is: exact, with the ranks of all adapters side by side, or the best
approximation of a rank, of a stack of experts for each expert. Factors are in B, so that the
scaling of every pair is 1. What is written is read back and compared with the sum of the adapters'
own matrices. `qcore.merging.combined_folder` writes.

Code: ``QC-ADAPTER-021`` an adapter has changes that a sum of matrices cannot hold, ``-022`` the
adapters name no base, or several.

Shapes: E experts, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.changes import Pair
from ..adapter.combined import Weighted, combined
from ..adapter.delta import Deltas, one_thread
from ..adapter.evidence import read_for
from ..adapter.locate import locate_adapter
from ..adapter.named_base import base_name
from ..adapter.norms import square_of_product
from ..adapter.peft_names import CONFIG, Adapter
from ..adapter.read_several import read_adapters
from ..api.parameters import Kind
from ..checkpoint.checkpoint import read_json, safe_file
from ..errors import InputError, NumericError
from ..io.artifact import check_target, publish
from ..plugins.resolve_model import Identified, identify
from ..reporting import Finished, Reporter, RunStarted
from .combined_folder import CombinedWeight, write_combined
from .several import AdapterPart, by_expert, prove_parts

#: Share of the matrices by which the file may differ beyond the error: both are float32.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineReport:
    """The result of `combine`.

    Attributes:
        output: the adapter folder.
        model: the base.
        rank: the requested rank; ``None`` for the exact sum.
        adapters: the part of each adapter.
        weights: the pairs, by canonical name of the weight.
        notes: what the user must know of the adapters.
    """

    output: Path
    model: str
    rank: int | None
    adapters: tuple[AdapterPart, ...]
    weights: Mapping[str, CombinedWeight]
    notes: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        """The error of all pairs together over the norm of all deltas."""
        weights = self.weights.values()
        norm = math.hypot(*(weight.norm for weight in weights))
        return math.hypot(*(weight.error for weight in weights)) / norm if norm else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the payload of ``qcore adapter combine --json``."""
        return {
            "output": str(self.output),
            "model": self.model,
            "rank": self.rank,
            "adapters": [part.as_json() for part in self.adapters],
            "pairs": len(self.weights),
            "relative_error": self.relative_error,
            "tensors": [
                {"name": name, "r": weight.lora.r, "norm": weight.norm,
                 "relative_error": weight.relative_error}
                for name, weight in self.weights.items()
            ],
            "notes": list(self.notes),
        }  # fmt: skip


def combine(
    adapters: Mapping[str, float],
    output: str | Path,
    *,
    model: str = "",
    rank: int | None = None,
    adapter_class: str = "",
    trust_generation: bool = False,
    generation: str = "",
    reporter: Reporter | None = None,
) -> CombineReport:
    """Write the weighted sum of adapters as an adapter.

    No weight of the base is read.

    Args:
        adapters: the weight of each adapter, by folder or hub id.
        output: the folder to publish; absent or empty.
        model: the base: a folder or a hub id; empty for the one that the adapters name.
        rank: the rank of each pair, of experts for each expert; ``None`` for the exact sum.
        adapter_class: the class that the adapter is written for; empty for that of the adapters.
        trust_generation: accept adapters that name a base of another generation.
        generation: accepted only where evidence is missing, never against it.
        reporter: receives events; silent by default.

    Raises:
        UsageError: ``QC-ADAPTER-019`` a weight is not a number other than 0, ``-001`` not a class.
        InputError: ``QC-ADAPTER-020`` to ``-022``, or an adapter does not fit the base.
        NumericError: ``QC-MERGE-005`` an adapter has no effect, or the file does not hold the sum.
        WriteError: the output exists or cannot be written; nothing half-written stays.
    """
    reporter = reporter or Reporter()
    target = check_target(output)
    base = identify(model or named_base(adapters), generation=generation, carry=True)
    own = read_adapters(base, adapters, trust_base=True, trust_generation=trust_generation)
    _refuse_folded(own)
    total = combined(own)
    reporter.lines(notes := tuple(note for one in own for note in one.adapter.notes))
    reporter.emit(RunStarted(verb="combine", model=str(base.checkpoint.source), output=target))
    with torch.no_grad(), one_thread():
        deltas = Deltas(total)
        parts = prove_parts(own, deltas)
        weights = {}
        with reporter.progress("combining", len(total.pairs), "pairs") as advance:
            for name, pair in total.pairs.items():
                weights[name] = _weight(pair, *deltas.sides(name), rank)
                advance(1)
        report = CombineReport(
            output=target, model=str(base.checkpoint.source), rank=rank, adapters=tuple(parts),
            weights=weights, notes=notes,
        )  # fmt: skip
        with publish(target, kind="adapter") as out:
            write_combined(out, base, own, total, weights, adapter_class, report.as_json())
            _check_written(base, out.folder, deltas, weights)
    reporter.emit(Finished(verb="combine", output=target, result=report.as_json()))
    return report


def named_base(adapters: Iterable[str]) -> str:
    """Return the base that all adapters name in ``base_model_name_or_path``.

    Raises:
        InputError: ``QC-ADAPTER-022`` the adapters name no base, or several.
    """
    names: dict[str, str] = {}
    for adapter in adapters:
        folder = locate_adapter(adapter).path
        if name := base_name(read_json(safe_file(folder, CONFIG))):
            names.setdefault(name, adapter)
    if len(names) != 1:
        raise InputError(
            "QC-ADAPTER-022",
            "name several bases" if names else "name no base",
            file=", ".join(names.values()) or ", ".join(adapters),
            field="base_model_name_or_path",
            found=", ".join(names) or "nothing",
            expected="one base",
            fix="pass --model with the base of the adapters",
        )
    return next(iter(names))


def _refuse_folded(adapters: Sequence[Weighted]) -> None:
    """Refuse what is not LoRA on a linear map or on experts."""
    for own in adapters:
        for name in sorted(own.adapter.folded):
            change = own.adapter.changes[name]
            if isinstance(change, Pair) and change.has_magnitude:
                what = "has DoRA, which a sum of matrices cannot hold"
            elif isinstance(change, Pair) and change.under is None:
                what = "has LoRA on the embedding or the head, which is not combined"
            else:
                what = "has saved values, which a sum of matrices cannot hold"
            raise InputError(
                "QC-ADAPTER-021",
                what,
                file=own.adapter.path,
                field=name,
                found=f"{len(own.adapter.folded)} such weights",
                expected="LoRA on linear maps and experts",
                fix="add the adapters in a merge: qcore merge --adapter A --adapter B",
            )


def _weight(pair: Pair, a: Tensor, b: Tensor, rank: int | None) -> CombinedWeight:
    """Return the matrices of one weight, with its scaling in B.

    Args:
        pair: the weight.
        a: ``[r, in]``; of experts ``[E r, in]``.
        b: ``[out, r]``; of experts ``[out, r E]``.
        rank: the rank to approximate with; ``None`` for the exact product.
    """
    sides = [(x, pair.scaling * y) for x, y in by_expert(pair, a, b)]
    if rank is None:
        norm = math.hypot(*(_norm(x, y) for x, y in sides))
        made = [(x, y, 0.0) for x, y in sides]
        r = pair.r
    else:
        made, norms = [], []
        r = min(rank, pair.r, *pair.tensor.shape[-2:])
        for x, y in sides:
            x, y, own, error = _of_rank(x, y, r)
            made.append((x, y, error))
            norms.append(own)
        norm = math.hypot(*norms)
    stacked = pair.tensor.row.kind is Kind.EXPERTS
    return CombinedWeight(
        group=pair.tensor.row.group,
        r=r,
        a=torch.cat([x for x, _, _ in made]).float().contiguous(),
        # Row e r + k of A and column k E + e of B belong to expert e.
        b=(torch.stack([y for _, y, _ in made], dim=2).flatten(1) if stacked else made[0][1])
        .float()
        .contiguous(),
        norm=norm,
        error=math.hypot(*(error for _, _, error in made)),
    )


def _norm(a: Tensor, b: Tensor) -> float:
    """Return the Frobenius norm of ``B A`` without computing the product."""
    return math.sqrt(square_of_product(a, b))


def _of_rank(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best A and B of a rank, the norm of ``B A``, and of what they leave.

    The product is not computed: its singular values are those of the triangular factors.
    """
    left, small_b = torch.linalg.qr(b)
    right, small_a = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(small_b @ small_a.T)
    root = s[:r].sqrt()
    count = len(root)
    new_a, new_b = a.new_zeros(r, a.shape[1]), b.new_zeros(len(b), r)
    new_a[:count] = root[:, None] * (right @ v[:count].T).T
    new_b[:, :count] = left @ u[:, :count] * root
    return new_a, new_b, float(s.norm()), float(s[r:].norm())


def _check_written(
    base: Identified, folder: Path, deltas: Deltas, weights: Mapping[str, CombinedWeight]
) -> None:
    """Read the adapter back, and compare each pair with the sum.

    Raises:
        NumericError: ``QC-MERGE-005``.
    """
    written: Adapter = read_for(base, folder, trust_base=True, trust_generation=True)
    mine = Deltas(written)
    for name in deltas.pairs.keys() ^ mine.pairs.keys():
        raise _wrong(folder, name, "not the same weights", "the weights of the adapters")
    for name, weight in weights.items():
        pair, own = deltas.pairs[name], mine.pairs[name]
        mine_by_expert = by_expert(own, *mine.sides(name))
        off = math.hypot(
            *(
                _norm(torch.cat([a, x]), torch.cat([pair.scaling * b, -own.scaling * y], dim=1))
                for (a, b), (x, y) in zip(
                    by_expert(pair, *deltas.sides(name)), mine_by_expert, strict=True
                )
            )
        )
        # Deltas may cancel each other, so that rounding is a share of the matrices, not of the sum.
        rows, columns = (float(side.double().norm()) for side in deltas.sides(name))
        rounding = _ROUNDING * abs(pair.scaling) * rows * columns
        allowed = weight.error * (1 + _ROUNDING) + rounding
        if not off <= allowed:
            raise _wrong(folder, name, f"{off:.1e}", f"<= {allowed:.1e}")


def _wrong(folder: Path, name: str, found: str, expected: str) -> NumericError:
    return NumericError(
        "QC-MERGE-005",
        "does not hold the sum of the adapters",
        file=folder,
        field=name,
        found=found,
        expected=expected,
        fix="report this: combine wrote other matrices than it computed",
    )
