"""Computes a changed weight in float64, in blocks of rows; merges change weights nowhere else.

This file decides the arithmetic of a merge: ``W + scaling * B A``, and with DoRA each row of
that sum scaled to its magnitude, ``m / ||row|| * row``. It is computed in float64, a block of rows
at a time, so that the result is rounded once, to the dtype of the file, and no temporary has the
size of a weight. Matrices for parts of a weight are assembled to one pair when it is used. Values
that replace a weight or some rows are read by `replaced_values`.
`qcore.merging` writes the sums and compares them with the forward of training.

Shapes: E experts, r rank of one LoRA pair.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..api.parameters import Kind, Region
from ..checkpoint.checkpoint import Header
from ..errors import InputError, NumericError
from ..nn.load import DTYPES, as_bytes, read_exact
from .changes import Pair, Piece, Replacement
from .peft_names import Adapter
from .replaced_values import ReplacedValues, check_finite

#: Threads that add deltas; one core is left for the thread that hashes and writes.
WORKERS = min(6, max(2, (os.cpu_count() or 2) - 1))
BLOCK = 2**18  #: elements of a weight converted to float64 at a time; they fit in the CPU cache
_ALL = slice(None)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block.

    On blocks this small, threads spend more time waiting than adding, above all on a busy machine,
    and another core hashes meanwhile.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def single() -> None:
    """Limit torch to one thread; the initializer of a merge worker."""
    torch.set_num_threads(1)


class Deltas:
    """The matrices of an adapter, in memory, and the changed values for a region of a weight.

    Args:
        adapter: the adapter; all of its matrices are read, and saved values when they are used.

    Attributes:
        pairs: the adapter's pairs, by canonical name of the weight.
        folded: names of the weights whose change is added to the weight before it is used.

    Raises:
        NumericError: ``QC-MERGE-003`` the adapter contains a NaN or an infinity.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.pairs = adapter.pairs
        self.folded = adapter.folded
        self._path = adapter.path
        self._values: dict[Header, Tensor] = {}
        self._scaling = {name: pair.scaling for name, pair in self.pairs.items()}
        self._by_expert = {n: _by_expert(p) for n, p in self.pairs.items() if not p.is_peft}
        with one_thread():
            for pair in self.pairs.values():
                for piece in pair.pieces:
                    self._take(piece, pair.tensor.shape[0])
        self._replaced = {
            name: ReplacedValues(self._path, change)
            for name, change in adapter.changes.items()
            if isinstance(change, Replacement)
        }
        self._under = {
            name: ReplacedValues(self._path, pair.under)
            for name, pair in self.pairs.items()
            if pair.under is not None
        }

    def _take(self, piece: Piece, experts: int) -> None:
        """Read the matrices of a piece, in the layout of `Piece`.

        Several weights may have them in common; they are read and rearranged once.
        """
        new = [header for header in piece.headers if header not in self._values]
        for header in new:
            self._values[header] = self._read(header)
        if piece.a not in new:
            return
        a, b = self._values[piece.a], self._values[piece.b]
        if piece.older:
            a, b = _as_newer(experts, piece.r, a, b)
        if piece.embedding:
            a, b = b.t().contiguous(), a.t().contiguous()
        self._values[piece.a], self._values[piece.b] = a, b

    def _read(self, header: Header) -> Tensor:
        """Read a tensor of the adapter, float32."""
        value = torch.empty(header.shape, dtype=DTYPES[header.dtype])
        with (self._path / header.file).open("rb") as file:
            file.seek(header.start)
            read_exact(file, as_bytes(value), header)
        check_finite(value, self._path, header)
        return value.float()

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B of a weight, float32, in the layout of PEFT 0.21 (see `Piece`).

        Pieces are assembled on each call, so that only one pair needs the memory for it.
        """
        pair = self.pairs[name]
        if pair.is_peft:
            return self._values[pair.pieces[0].a], self._values[pair.pieces[0].b]
        if pair.tensor.row.kind is not Kind.EXPERTS:
            a, b = self._matrices(name, None)
            return a.float(), b.float()
        experts, out, into = pair.tensor.shape
        every_a, every_b = torch.zeros(experts, pair.r, into), torch.zeros(out, pair.r, experts)
        for number in range(experts):
            a, b = self._matrices(name, number)
            every_a[number, : len(a)], every_b[:, : len(a), number] = a, b
        return every_a.view(-1, into), every_b.view(out, -1)

    def magnitude(self, name: str) -> Tensor | None:
        """Return DoRA's m ``[out]`` of a weight, float32; ``None`` for plain LoRA."""
        pair = self.pairs[name]
        if not pair.has_magnitude:
            return None
        whole = torch.empty(pair.tensor.shape[0])
        for piece in pair.pieces:
            assert piece.magnitude is not None
            whole[piece.rows or _ALL] = self._values[piece.magnitude][piece.source or _ALL]
        return whole

    def folded_into(self, name: str, value: Tensor, region: Region, dtype: torch.dtype) -> Tensor:
        """Return `value`, which is ``tensor[region]``, with its change if the weight is `folded`.

        Args:
            name: canonical name of the tensor.
            value: the values, contiguous; they are not modified.
            region: slices of the canonical tensor, one for each dimension.
            dtype: of the run; the result has it if it is wider than that of `value`.
        """
        if name not in self.folded:
            return value
        changed = value.to(torch.promote_types(value.dtype, dtype), copy=True)
        for view, total in self.add(name, changed, region):
            view.copy_(total)
        return changed

    def add(self, name: str, weight: Tensor, region: Region) -> Iterator[tuple[Tensor, Tensor]]:
        """Compute the changed values in float64, where `weight` is ``tensor[region]``.

        Args:
            name: canonical name of the tensor.
            weight: the values of the region, contiguous, in any shape.
            region: slices of the canonical tensor, one for each dimension.

        Yields:
            A view of some rows of `weight`, and the float64 result for them. The caller may write
            to the view before it takes the next one.

        Raises:
            InputError: ``QC-MERGE-012`` the region cuts the rows of a weight with DoRA.
            NumericError: ``QC-MERGE-003`` a row with DoRA is 0.
        """
        weight = weight.view([part.stop - part.start for part in region])
        if name in self._replaced:
            yield from self._replaced[name].over(weight, region)
            return
        *stack, rows, columns = region
        slices = range(stack[0].start, stack[0].stop) if stack else [None]
        magnitude = self._magnitude(name, rows, columns)
        for values, number in zip(weight if stack else [weight], slices, strict=True):
            a, b = self._matrices(name, number)
            a, b = a[:, columns].double(), b[rows].double()
            step = max(1, BLOCK // values.shape[1])
            for at in range(0, len(values), step):
                view = values[at : at + step]
                first = rows.start + at
                part = (*stack, slice(first, first + len(view)), columns)
                base = self.below(name, view, part)
                total = torch.addmm(base, b[at : at + step], a, alpha=self._scaling[name])
                if magnitude is not None:
                    norm = torch.linalg.vector_norm(total, dim=1, keepdim=True)
                    self._check_norms(name, norm, first)
                    total *= magnitude[at : at + step] / norm
                yield view, total

    def below(self, name: str, values: Tensor, region: Region) -> Tensor:
        """Return what the product is added to, float64: the weight, or what replaces it.

        Args:
            name: canonical name of the tensor.
            values: ``tensor[region]``, in the shape of the region.
            region: slices of the canonical tensor, one for each dimension.
        """
        under = self._under.get(name)
        if under is None:
            return values.double()
        return torch.cat([total for _, total in under.over(values, region)])

    def _magnitude(self, name: str, rows: slice, columns: slice) -> Tensor | None:
        """Return ``m[rows]`` as a float64 column; DoRA needs whole rows for their norms."""
        magnitude = self.magnitude(name)
        if magnitude is None:
            return None
        width = self.pairs[name].tensor.shape[-1]
        if (columns.start, columns.stop) != (0, width):
            raise InputError(
                "QC-MERGE-012",
                "has DoRA, which needs whole rows, and the base stores parts of its rows",
                file=self._path,
                field=name,
                found=f"columns {columns.start} to {columns.stop}",
                expected=f"{width} columns in one tensor",
                fix="save the base with whole weights, with transformers' save_pretrained",
            )
        return magnitude[rows].double()[:, None]

    def _check_norms(self, name: str, norms: Tensor, first: int) -> None:
        """Refuse a row without a direction: PEFT divides its magnitude by 0."""
        if bool(norms.all()):
            return
        raise NumericError(
            "QC-MERGE-003",
            "has DoRA on a row that is 0 in base + adapter, so that it cannot be scaled",
            file=self._path,
            field=name,
            found=f"row {first + int((norms == 0).flatten().nonzero()[0])}",
            expected="rows that are not 0",
            fix="name the base that the adapter was trained on, or train without DoRA here",
        )

    def _matrices(self, name: str, number: int | None) -> tuple[Tensor, Tensor]:
        """Return ``A [r, in]`` and ``B [out, r]`` of a weight, or of one expert of a stack.

        They are assembled in float64, which B needs where the pieces differ in their scaling.
        """
        pair = self.pairs[name]
        if pair.is_peft:
            return self._piece(pair.pieces[0], pair.tensor.shape[0], number)
        pieces = self._by_expert[name][number]
        out, into = pair.tensor.shape[-2:]
        r = sum(piece.r for piece in pieces)
        a, b = torch.zeros(r, into).double(), torch.zeros(out, r).double()
        at = 0
        for piece in pieces:
            columns = slice(at, at + piece.r)
            own_a, own_b = self._piece(piece, pair.tensor.shape[0], number)
            a[columns] = own_a.double()
            factor = piece.scaling / self._scaling[name]
            b[piece.rows or _ALL, columns] = factor * own_b.double()
            at += piece.r
        return a, b

    def _piece(self, piece: Piece, experts: int, number: int | None) -> tuple[Tensor, Tensor]:
        """Return ``A [r, in]`` and ``B [n, r]`` of a piece, for one expert of a stack."""
        a, b = self._values[piece.a], self._values[piece.b]
        if number is not None and piece.expert is None:
            if a.dim() == 3:
                a, b = (side[number if len(side) > 1 else 0] for side in (a, b))
            else:
                a, b = a[number * piece.r : (number + 1) * piece.r], b[:, number::experts]
        return a, b[piece.source or _ALL]


def _by_expert(pair: Pair) -> dict[int | None, list[Piece]]:
    """Return the pieces of each expert; those of a weight without experts under ``None``."""
    if pair.tensor.row.kind is not Kind.EXPERTS:
        return {None: [*pair.pieces]}
    shared = [piece for piece in pair.pieces if piece.expert is None]
    by_expert: dict[int | None, list[Piece]] = {n: [*shared] for n in range(pair.tensor.shape[0])}
    for piece in pair.pieces:
        if piece.expert is not None:
            by_expert[piece.expert].append(piece)
    return by_expert


def _as_newer(experts: int, r: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rearrange expert matrices from the layout of PEFT before 0.19.1 to that of `Piece`.

    The delta of expert e is ``A_e^T B_e^T``, so its ``B^T`` is today's A and its ``A^T`` is today's
    B.

    Args:
        experts: number of experts.
        r: rank of each expert.
        a: ``[E r, out]``, row ``e r + k`` of expert e.
        b: ``[in, r E]``, column ``k E + e`` of expert e.
    """
    by_expert = b.view(b.shape[0], r, experts).permute(2, 1, 0)
    by_rank = a.view(experts, r, a.shape[1]).permute(2, 1, 0)
    return by_expert.reshape(experts * r, -1), by_rank.reshape(-1, r * experts)
