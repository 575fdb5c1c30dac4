"""Chunk layout of the delta rule: how the documents of a pack are cut into chunks and ordered.

This file decides the order of chunks: all first chunks, then all second chunks, and so on, longer
documents first. The chunks of one step of the scan are then contiguous, and the documents that are
still running are a prefix of the states: the scan over chunks is batched across documents without
an index.

Shapes: T tokens, N documents, M chunks of C tokens; short chunks are padded with zeros, which
neither write (k = v = beta = 0) nor decay (g = 0).

Kernels that process a document in one program need no such order: `Tables` lists where documents
and chunks start, in token order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qcore.ops import device_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive steps of the scan.

    Attributes:
        chunks: the chunks of all steps, which are contiguous.
        running: number of documents at the first step.
        steps: (first chunk within the segment, number of chunks) of each step.
    """

    chunks: slice
    running: int
    steps: tuple[tuple[int, int], ...]

    @staticmethod
    def of(steps: Sequence[tuple[int, int]]) -> Segment:
        """From the (first chunk, number of chunks) of each step."""
        start, (last, count) = steps[0][0], steps[-1]
        return Segment(
            chunks=slice(start, last + count),
            running=steps[0][1],
            steps=tuple((first - start, number) for first, number in steps),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """A pack as kernels read it, copied to the device once.

    Attributes:
        documents: ``[N, 4]`` int32, longest document first, so that the longest program starts
            first: first token, end token, first chunk, index of the document.
        chunks: ``[M, 2]`` int32, in token order: first token, end token of its document.
    """

    documents: Tensor
    chunks: Tensor

    @staticmethod
    def of(cu_seqlens: Sequence[int], size: int, device: torch.device) -> Tables:
        """Tables of the documents of `cu_seqlens`, in chunks of `size` tokens."""
        documents: list[tuple[int, int, int, int]] = []
        chunks: list[tuple[int, int]] = []
        for number, (start, end) in enumerate(pairwise(cu_seqlens)):
            documents.append((start, end, len(chunks), number))
            chunks += [(at, end) for at in range(start, end, size)]
        documents.sort(key=lambda document: document[0] - document[1])
        flat = torch.tensor([number for row in (*documents, *chunks) for number in row])
        here = flat.to(torch.int32).to(device, non_blocking=True)
        split = 4 * len(documents)
        return Tables(documents=here[:split].view(-1, 4), chunks=here[split:].view(-1, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """The chunks of one pack.

    Attributes:
        tokens: T.
        size: C.
        total: M.
        order: indices of documents, most chunks first.
        steps: (first chunk, number of chunks) of each step of the scan.
        rows: ``[T]`` position of each token among ``M * C``; ``None`` if it equals its index.
        sorting: `order` and its inverse as indices on the device; ``None`` for the identity.
            Computed once here, because an index built from a list synchronizes the GPU.
        tables: the pack for kernels; ``None`` on CPU, which runs none.
    """

    tokens: int
    size: int
    total: int
    order: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    rows: Tensor | None
    sorting: tuple[Tensor, Tensor] | None
    tables: Tables | None

    @staticmethod
    def of(cu_seqlens: Sequence[int], size: int, device: torch.device) -> Chunks:
        """Lay out the documents of `cu_seqlens`."""
        counts = [-(-(end - start) // size) for start, end in pairwise(cu_seqlens)]
        order = sorted(range(len(counts)), key=lambda document: (-counts[document], document))
        steps, place, first = [], {}, 0
        for step in range(max(counts, default=0)):
            running = [document for document in order if counts[document] > step]
            for offset, document in enumerate(running):
                place[document, step] = first + offset
            steps.append((first, len(running)))
            first += len(running)
        return Chunks(
            tokens=cu_seqlens[-1],
            size=size,
            total=first,
            order=tuple(order),
            steps=tuple(steps),
            rows=None if len(counts) == 1 else _rows(cu_seqlens, size, place, device),
            sorting=None if order == sorted(order) else _sorting(order, device),
            tables=None if device_type(device) == "cpu" else Tables.of(cu_seqlens, size, device),
        )

    def segments(self, chunks: int) -> Iterator[Segment]:
        """Split the scan into segments of consecutive steps with about `chunks` chunks each."""
        taken: list[tuple[int, int]] = []
        for first, count in self.steps:
            taken.append((first, count))
            if first + count - taken[0][0] >= chunks:
                yield Segment.of(taken)
                taken = []
        if taken:
            yield Segment.of(taken)

    def spread(self, x: Tensor) -> Tensor:
        """``[T, heads, ...] -> [M, C, heads, ...]``, padded with zeros; may be a view of x."""
        shape = (self.total * self.size, *x.shape[1:])
        if self.rows is not None:
            x = x.new_zeros(shape).index_copy_(0, self.rows, x)
        elif shape[0] != self.tokens:
            x = torch.cat([x, x.new_zeros(shape[0] - self.tokens, *x.shape[1:])])
        return x.view(self.total, self.size, *x.shape[1:])

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`; drops the padding."""
        x = x.flatten(0, 1)
        return x[: self.tokens] if self.rows is None else x.index_select(0, self.rows)

    def by_length(self, states: Tensor) -> Tensor:
        """A copy of states ``[N, ...]`` in the order of `order`."""
        return states.clone() if self.sorting is None else states.index_select(0, self.sorting[0])

    def by_document(self, states: Tensor) -> Tensor:
        """The inverse of `by_length`."""
        return states if self.sorting is None else states.index_select(0, self.sorting[1])


def _sorting(order: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    forth = torch.tensor(order)
    return forth.to(device), forth.argsort().to(device)


def _rows(
    cu_seqlens: Sequence[int],
    size: int,
    place: dict[tuple[int, int], int],
    device: torch.device,
) -> Tensor:
    shifts, lengths = [], []
    for document, (start, end) in enumerate(pairwise(cu_seqlens)):
        for step, at in enumerate(range(start, end, size)):
            shifts.append(place[document, step] * size - at)
            lengths.append(min(size, end - at))
    shift, length = torch.tensor([shifts, lengths], dtype=torch.int64).to(device)
    tokens = cu_seqlens[-1]
    moved = torch.repeat_interleave(shift, length, output_size=tokens)
    return moved + torch.arange(tokens, device=device)
