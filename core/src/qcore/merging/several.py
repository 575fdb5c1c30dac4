"""Several adapters in one merge: the part of each is proved.

This file decides that no adapter is lost in a sum. `qcore.adapter.combined` makes one adapter of
them, which is merged and compared with base + adapter as any other. Here the product of each
adapter's own matrices with a random vector is computed alone; the weighted sum of these must be
that of the combined matrices. A change that is not a product (DoRA, saved values) must be in the
sum exactly as its adapter has it. An adapter that changes nothing is refused.

Code: ``QC-MERGE-005`` an adapter without an effect, or a sum that is not that of its adapters.

Shapes: E experts, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapter.changes import Change, Pair
from ..adapter.combined import Weighted, is_product
from ..adapter.delta import Deltas, one_thread
from ..adapter.norms import square_of_product
from ..api.parameters import Kind
from ..errors import NumericError

#: Share of the norms that a sum may differ by: B of a combined pair is rounded to float32.
_SUM = 1e-5
_ROWS = 16  # of a weight whose change is not a product that are compared, beside first and last


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPart:
    """What one of several adapters adds to a merge.

    Attributes:
        adapter: the folder or hub id.
        weight: the factor of its changes.
        pairs: its LoRA pairs.
        norm: Frobenius norm of all its deltas, with the weight; DoRA and saved values not counted.
    """

    adapter: str
    weight: float
    pairs: int
    norm: float

    def as_json(self) -> dict[str, Any]:
        """The part as it stands in the manifest."""
        return asdict(self)


def prove_parts(
    adapters: Sequence[Weighted], total: Deltas, moved: Collection[str] = ()
) -> list[AdapterPart]:
    """Prove that the merged changes are those of each adapter.

    Args:
        adapters: the adapters; the matrices of one at a time are read.
        total: the changes of their sum, as they were merged.
        moved: canonical names of the weights that the merge changed.

    Raises:
        NumericError: ``QC-MERGE-005``.
    """
    sums: dict[str, Tensor] = {}
    norms: dict[str, float] = {}
    parts: list[AdapterPart] = []
    with torch.no_grad(), one_thread():
        for own in adapters:
            squares = 0.0
            deltas = Deltas(own.adapter)
            for name, change in own.adapter.changes.items():
                if not (isinstance(change, Pair) and is_product(change)):
                    _check_alone(own, deltas, total, name)
                    continue
                factor = own.weight * change.scaling
                product, square = _probe(change, *deltas.sides(name))
                squares += factor**2 * square
                norms[name] = norms.get(name, 0.0) + float((factor * product).norm())
                sums[name] = sums.get(name, 0) + factor * product
            parts.append(_part(own, math.sqrt(squares), moved))
        for name, expected in sums.items():
            pair = total.pairs[name]
            product, _ = _probe(pair, *total.sides(name))
            off = float((pair.scaling * product - expected).norm())
            if not off <= _SUM * norms[name]:
                raise NumericError(
                    "QC-MERGE-005", "is not the sum of the adapters", file=adapters[0].adapter.path,
                    field=name, found=f"{off:.1e}", expected=f"<= {_SUM * norms[name]:.1e}",
                    fix="report this: the merge added other matrices than the adapters have",
                )  # fmt: skip
    return parts


def _check_alone(own: Weighted, deltas: Deltas, total: Deltas, name: str) -> None:
    """Check that the merge has a change that is not a product exactly as its adapter has it.

    Both are applied to the same random values of some rows, or experts, of the weight.
    """
    change = own.adapter.changes[name]
    shape = change.tensor.shape
    generator = torch.Generator().manual_seed(shape[0])
    for row in _some_rows(change, generator):
        region = (slice(row, row + 1), *(slice(0, n) for n in shape[1:]))
        weight = torch.randn(1, *shape[1:], generator=generator)
        alone, merged = (
            torch.cat([values.flatten() for _, values in each.add(name, weight.clone(), region)])
            for each in (deltas, total)
        )
        if not torch.equal(alone, merged):
            raise NumericError(
                "QC-MERGE-005", "is not the change of the adapter", file=own.adapter.path,
                field=name, found=f"row {row}: {float((alone - merged).abs().max()):.1e} off",
                expected="the same values",
                fix="report this: the merge has another change of this weight",
            )  # fmt: skip


def _some_rows(change: Change, generator: torch.Generator) -> list[int]:
    """Return the first and the last row of a weight and some others, of replaced rows too."""
    saved = change.under if isinstance(change, Pair) else change
    rows = [0, change.tensor.shape[0] - 1]
    rows += torch.randint(change.tensor.shape[0], (_ROWS,), generator=generator).tolist()
    if saved is not None and saved.rows:
        picked = torch.randint(len(saved.rows), (_ROWS,), generator=generator).tolist()
        rows += [saved.rows[number] for number in picked]
    return sorted({*rows})


def _part(own: Weighted, norm: float, moved: Collection[str]) -> AdapterPart:
    adapter = own.adapter
    # No other adapter changes these, so it was this one that moved them.
    alone = {n for n, c in adapter.changes.items() if not (isinstance(c, Pair) and is_product(c))}
    if norm == 0 and alone.isdisjoint(moved):
        raise NumericError(
            "QC-MERGE-005", "has no effect: it changes no weight", file=adapter.path, found="0",
            expected="a difference", fix="leave it out, or train longer",
        )  # fmt: skip
    return AdapterPart(
        adapter=adapter.source or str(adapter.path), weight=own.weight, pairs=len(adapter.pairs),
        norm=norm,
    )  # fmt: skip


def by_expert(pair: Pair, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return A ``[r, in]`` and B ``[out, r]`` of each expert, or of the weight, in float64.

    Args:
        pair: the weight, and its rank.
        a: ``[r, in]``, or ``[E r, in]``.
        b: ``[out, r]``, or ``[out, r E]``, in the layout of PEFT.
    """
    a, b = a.double(), b.double()
    if pair.tensor.row.kind is not Kind.EXPERTS:
        return [(a, b)]
    experts = pair.tensor.shape[0]
    by_rank = b.view(len(b), -1, experts)
    own = a.view(experts, -1, a.shape[1])
    return [(own[number], by_rank[:, :, number]) for number in range(experts)]


def _probe(pair: Pair, a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """Return ``B A x`` of a random x, and the squared Frobenius norm of ``B A``, in float64."""
    generator = torch.Generator().manual_seed(a.shape[1])
    x = torch.randn(a.shape[1], dtype=torch.float64, generator=generator)
    sides = by_expert(pair, a, b)
    product = torch.cat([own_b @ (own_a @ x) for own_a, own_b in sides])
    return product, sum(square_of_product(own_a, own_b) for own_a, own_b in sides)
