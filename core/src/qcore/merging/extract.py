"""`qcore adapter extract`: the LoRA adapter that turns one checkpoint into another.

This file decides which differences become LoRA: those of every weight that LoRA can be applied to,
each as the best approximation of the rank, of a stack of experts for each expert. Other tensors
that differ (norms, embeddings, heads, convolutions, parts that are not loaded) are refused, or left
out with the user's consent. One weight of both checkpoints is in memory at a time.
`qcore.merging.low_rank` approximates, `qcore.merging.extracted_folder` writes.

Codes: ``QC-EXTRACT-001`` the checkpoints do not have the same weights, ``-002`` a tensor differs
that LoRA cannot change, ``-003`` no weight differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api.parameters import Kind
from ..checkpoint.checkpoint import Checkpoint, Header
from ..checkpoint.layout import Layout, Located
from ..errors import InputError, NumericError
from ..io.artifact import check_target
from ..nn.load import Slab, read_ahead, read_tensor
from ..nn.qlora.lora_layer import Lora
from ..plugins.resolve_model import Identified, identify
from ..reporting import Finished, Reporter, RunStarted
from .disk_rows import row_slices
from .extracted_folder import ExtractedWeight, write_extracted
from .low_rank import LowRank, low_rank

_SHOWN = 5  # names in an error
_CHUNK = 2**24  # bytes that are compared at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractReport:
    """The result of `extract`.

    Attributes:
        output: the folder.
        r: the requested rank.
        weights: the pairs by canonical name of the weight.
        left_out: the tensors that differ and are left out, and why.
        unchanged: number of tensors that do not differ.
    """

    output: Path
    r: int
    weights: Mapping[str, ExtractedWeight]
    left_out: Mapping[str, str]
    unchanged: int

    @property
    def relative_error(self) -> float:
        """The error of all pairs together over the norm of all their differences."""
        return relative(self.weights.values())

    def groups(self) -> list[dict[str, Any]]:
        """Return a line for each group: pairs, norm of the differences, errors."""
        by_group: dict[str, list[ExtractedWeight]] = {}
        for weight in self.weights.values():
            by_group.setdefault(weight.group, []).append(weight)
        return [
            {
                "group": group,
                "pairs": len(weights),
                "norm": math.hypot(*(weight.norm for weight in weights)),
                "relative_error": relative(weights),
                "largest_relative_error": max(weight.relative_error for weight in weights),
            }
            for group, weights in sorted(by_group.items())
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the payload of ``qcore adapter extract --json``."""
        return {
            "output": str(self.output),
            "r": self.r,
            "pairs": len(self.weights),
            "relative_error": self.relative_error,
            "groups": self.groups(),
            "tensors": [
                {"name": name, "r": weight.lora.r, "norm": weight.norm,
                 "relative_error": weight.relative_error}
                for name, weight in self.weights.items()
            ],
            "left_out": dict(self.left_out),
            "unchanged": self.unchanged,
        }  # fmt: skip


def relative(weights: Any) -> float:
    """Return the relative error of several pairs together."""
    every: list[ExtractedWeight] = [*weights]
    return math.hypot(*(w.error for w in every)) / math.hypot(*(w.norm for w in every))


def extract(
    base: str,
    model: str,
    output: str | Path,
    *,
    r: int,
    partial: bool = False,
    adapter_class: str = "",
    generation: str = "",
    reporter: Reporter | None = None,
) -> ExtractReport:
    """Write the adapter of a rank that brings a base closest to a tuned checkpoint.

    Args:
        base: folder or hub id of the base.
        model: folder or hub id of the tuned checkpoint.
        output: the adapter folder to write.
        r: rank of each pair, of experts for each expert; a smaller weight gets its full rank.
        partial: leave out tensors that differ and that LoRA cannot change.
        adapter_class: the class that the adapter is written for; empty for the base's.
        generation: accepted only where a checkpoint lacks evidence of its generation.
        reporter: receives progress; silent by default.

    Raises:
        InputError: ``QC-EXTRACT-001`` to ``-003``.
        NumericError: ``QC-LOAD-003`` a weight is not finite, ``QC-MERGE-005`` the folder does not
            hold the pairs when it is read again.
        QcoreError: what reading the checkpoints, and writing the folder, raises.
    """
    reporter = reporter or Reporter()
    target = check_target(output)
    mine, theirs = (identify(name, generation=generation) for name in (base, model))
    reporter.emit(RunStarted(verb="extract", model=base, output=target))
    found = _Differences(mine, theirs, r)
    found.read(reporter)
    if found.left_out and not partial:
        raise _inexpressible(theirs, found.left_out)
    if not found.weights:
        raise InputError(
            "QC-EXTRACT-003",
            "has the same weights as the base",
            file=theirs.checkpoint.path,
            found=f"{found.unchanged} equal tensors",
            fix="name the tuned checkpoint as --model",
        )
    report = ExtractReport(
        output=target,
        r=r,
        weights=found.weights,
        left_out=found.left_out,
        unchanged=found.unchanged,
    )
    write_extracted(
        target, mine, theirs, report.weights, found.digests,
        r=r, adapter_class=adapter_class, result=report.as_json(),
    )  # fmt: skip
    reporter.emit(Finished(verb="extract", output=target, result=report.as_json()))
    return report


def _inexpressible(tuned: Identified, left_out: Mapping[str, str]) -> InputError:
    names = ", ".join([*left_out][:_SHOWN])
    more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
    first = next(iter(left_out))
    return InputError(
        "QC-EXTRACT-002",
        f"differs from the base in tensors that LoRA cannot change ({left_out[first]})",
        file=tuned.checkpoint.path,
        field=first,
        found=f"{names}{more}",
        fix="pass --partial to leave their changes out of the adapter",
    )


@dataclass
class _Differences:
    """Compares two checkpoints, a weight at a time."""

    base: Identified
    tuned: Identified
    r: int
    weights: dict[str, ExtractedWeight] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0

    def read(self, reporter: Reporter) -> None:
        """Compare all tensors; those of the base that cannot be compared are only hashed."""
        layout, theirs = self.base.layout, self.tuned.layout
        items, compared = [], set()
        for name, item in layout.located.items():
            if not self._is_tied(layout, name):
                items.append(item)
                compared |= {name} if self._has_both(name) else set()
            elif name in theirs.located and not self._is_tied(theirs, name):
                self._compare_untied(name)
        items.sort(key=lambda item: (item.places[0].header.file, item.places[0].header.start))
        with reporter.progress("comparing checkpoints", len(items), "tensors") as advance:
            parts: list[LowRank] = []
            differs = False
            for slab in read_ahead(self.base.checkpoint, items):
                name = slab.item.tensor.name
                if name in compared:
                    differs |= self._compare(slab, parts)
                if slab.digest is not None:  # the last slab of its tensor
                    if name in compared:
                        self._add(slab.item, parts, differs)
                    self.digests[name] = slab.digest
                    parts, differs = [], False
                    advance(1)
        self._compare_carried()

    def _compare(self, slab: Slab, parts: list[LowRank]) -> bool:
        """Whether a slab differs; adds its approximations to `parts` if LoRA can change it."""
        other = self._other(slab)
        if not self._is_lora(slab.item):
            return not _equal(slab.value, other)
        delta = other.float() - slab.value.float()
        self._check_finite(slab.item.tensor.name, delta)
        parts += self._approximated(delta, slab.item)
        return bool(delta.any())

    def _is_tied(self, layout: Layout, name: str) -> bool:
        item = layout.located.get(name)
        return item is not None and (item.tied is not None or name in layout.ties)

    def _is_lora(self, item: Located) -> bool:
        return item.tensor.row.kind is not None and item.tensor.part.loaded

    def _has_both(self, name: str) -> bool:
        """Whether the tuned checkpoint has the tensor in the same shape."""
        item, other = self.base.layout.located[name], self.tuned.layout.located.get(name)
        if other is None:
            self.left_out[name] = "the tuned checkpoint lacks it"
            return False
        if other.tensor.shape != item.tensor.shape:
            if self._is_lora(item):
                raise InputError(
                    "QC-EXTRACT-001",
                    "has another shape than in the base",
                    file=self.tuned.checkpoint.path,
                    field=name,
                    found=list(other.tensor.shape),
                    expected=list(item.tensor.shape),
                    fix="name the base that the checkpoint was tuned from",
                )
            self.left_out[name] = f"shape {list(other.tensor.shape)}, {list(item.tensor.shape)}"
            return False
        return True

    def _other(self, slab: Slab) -> Tensor:
        layout, name = self.tuned.layout, slab.item.tensor.name
        item = layout.located[name]
        if item.tied is not None:
            item = layout.located[item.tied]
        return read_tensor(self.tuned.checkpoint, item, slab.rows)

    def _compare_untied(self, name: str) -> None:
        """A head that only the base ties: it differs where the tuned one is not its embedding."""
        item = self.base.layout.located[name]
        source = item.tied or self.base.layout.ties[name]
        own = self.base.layout.located[source]
        other = self.tuned.layout.located[name]
        same = own.tensor.shape == other.tensor.shape and all(
            _equal(read_tensor(self.base.checkpoint, own, rows),
                   read_tensor(self.tuned.checkpoint, other, rows))
            for rows in row_slices(own)
        )  # fmt: skip
        if not same:
            self.left_out[name] = "tied in the base"

    def _check_finite(self, name: str, delta: Tensor) -> None:
        if not bool(delta.isfinite().all()):
            raise NumericError(
                "QC-LOAD-003",
                "holds a value that is not finite, in one of the checkpoints",
                file=self.tuned.checkpoint.path,
                field=name,
                fix="download the checkpoint again",
            )

    def _approximated(self, delta: Tensor, item: Located) -> list[LowRank]:
        r = self._rank(item)
        return [low_rank(one, r) for one in delta.view(-1, *delta.shape[-2:])]

    def _rank(self, item: Located) -> int:
        return min(self.r, *item.tensor.shape[-2:])

    def _add(self, item: Located, parts: list[LowRank], differs: bool) -> None:
        """Record a tensor whose slabs are all compared."""
        name, row = item.tensor.name, item.tensor.row
        if not differs:
            self.unchanged += 1
        elif not self._is_lora(item):
            self.left_out[name] = (
                f"group {row.group}" if item.tensor.part.loaded else f"part {item.tensor.part.name}"
            )
        else:
            a, b = parts[0].a, parts[0].b
            if row.kind is Kind.EXPERTS:
                # Row e r + k of A and column k E + e of B belong to expert e.
                a = torch.cat([part.a for part in parts])
                b = torch.stack([part.b for part in parts], dim=2).flatten(1)
            r = self._rank(item)
            self.weights[name] = ExtractedWeight(
                group=row.group,
                lora=Lora(r=r, lora_alpha=r),
                a=a.contiguous(),
                b=b.contiguous(),
                norm=math.hypot(*(part.norm for part in parts)),
                error=math.hypot(*(part.error for part in parts)),
            )

    def _compare_carried(self) -> None:
        """Compare tensors that no plugin explains."""
        theirs = {header.name: header for header in self.tuned.layout.carried}
        for header in self.base.layout.carried:
            other = theirs.pop(header.name, None)
            same = other is not None and _same_bytes(
                self.base.checkpoint, header, self.tuned.checkpoint, other
            )
            if not same:
                self.left_out[header.name] = "no plugin explains it"
        self.left_out |= dict.fromkeys(theirs, "the base lacks it")
        extra = self.tuned.layout.located.keys() - self.base.layout.located.keys()
        self.left_out |= dict.fromkeys(sorted(extra), "the base lacks it")


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all values are equal, also in different dtypes."""
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))


def _same_bytes(one: Checkpoint, mine: Header, other: Checkpoint, theirs: Header) -> bool:
    """Whether two tensors have one shape, dtype and content."""
    if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
        return False
    with one.file(mine.file).open("rb") as a, other.file(theirs.file).open("rb") as b:
        a.seek(mine.start)
        b.seek(theirs.start)
        for at in range(mine.start, mine.end, _CHUNK):
            count = min(_CHUNK, mine.end - at)
            if a.read(count) != b.read(count):
                return False
    return True
