"""Where the tokens of a pack lie once every document is cut into chunks.

This file decides the order of chunks: all first chunks, then all second chunks, and so on,
longer documents first. Then the chunks that one step of the scan works on lie side by side,
and the documents still running are a prefix of the states: the scan over chunks is batched
across documents without an index.

Shapes: T tokens, N documents, M chunks of C tokens; short chunks are filled with zeros, which
neither write (k = v = beta = 0) nor decay (g = 0).

Kernels that walk a document in one program need no such order: `Tables` says to them where
documents and chunks begin, in the order of tokens.
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
    """Some consecutive steps of the scan.

    Attributes:
        chunks: the chunks of all its steps, which lie side by side.
        running: documents at its first step.
        steps: per step, (first chunk within the segment, number of chunks).
    """

    chunks: slice
    running: int
    steps: tuple[tuple[int, int], ...]

    @staticmethod
    def of(steps: Sequence[tuple[int, int]]) -> Segment:
        """From the (first chunk, number of chunks) of its steps."""
        start, (last, count) = steps[0][0], steps[-1]
        return Segment(
            chunks=slice(start, last + count),
            running=steps[0][1],
            steps=tuple((first - start, number) for first, number in steps),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """A pack as kernels read it; made once, in one copy to the device.

    Attributes:
        documents: ``[N, 4]`` int32, most tokens first, so that the longest walk starts first:
            first token, token after the last, first chunk, number of the document.
        chunks: ``[M, 2]`` int32, in the order of tokens: first token, and the token after the
            last of its document.
    """

    documents: Tensor
    chunks: Tensor

    @staticmethod
    def of(cu_seqlens: Sequence[int], size: int, device: torch.device) -> Tables:
        """Of the documents of `cu_seqlens`, in chunks of `size` tokens."""
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
        order: documents, most chunks first.
        steps: per step of the scan, (first chunk, number of chunks).
        rows: ``[T]`` the place of each token among ``M * C``; ``None`` when it is its index.
        sorting: `order` and its inverse as indices on the device; ``None`` when they are the
            identity. Made here, once: an index made from a list makes a GPU wait.
        tables: the same pack for kernels; ``None`` on CPUs, which run none.
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
        """Cut the scan into runs of steps that hold about `chunks` chunks each, in order."""
        taken: list[tuple[int, int]] = []
        for first, count in self.steps:
            taken.append((first, count))
            if first + count - taken[0][0] >= chunks:
                yield Segment.of(taken)
                taken = []
        if taken:
            yield Segment.of(taken)

    def spread(self, x: Tensor) -> Tensor:
        """``[T, heads, ...] -> [M, C, heads, ...]``, zeros on the filling; may be a view of x."""
        shape = (self.total * self.size, *x.shape[1:])
        if self.rows is not None:
            x = x.new_zeros(shape).index_copy_(0, self.rows, x)
        elif shape[0] != self.tokens:
            x = torch.cat([x, x.new_zeros(shape[0] - self.tokens, *x.shape[1:])])
        return x.view(self.total, self.size, *x.shape[1:])

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`; what lies on the filling is dropped."""
        x = x.flatten(0, 1)
        return x[: self.tokens] if self.rows is None else x.index_select(0, self.rows)

    def by_length(self, states: Tensor) -> Tensor:
        """``[N, ...]`` states in the order of `order`; a copy."""
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
