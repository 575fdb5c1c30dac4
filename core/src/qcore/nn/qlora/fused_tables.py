"""Address tables by which a program of a fused Triton kernel finds its linear layer's tensors.

This file decides what a row of a table holds and when a table is out of date: when an address in it
is no longer that of the tensor. `fused_triton` uses the tables.

A row is `FIELDS` int64: the first program, what it is, an address, the first row (or rank, or
column) of the target, how much there is, and what the kind needs.

Shapes: K in, N out of all members, R ranks of all members, r of one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from .fused_grads import neighbours, sinks_of
from .members import LoraFactors, Members
from .nf4 import BLOCK

FIELDS = 16
#: Ranks that a tile holds.
WIDEST = 128
#: Tables of sharded weights that are kept.
KEPT = 8
_CODES, _VALUES, _B, _A = range(4)
_OF_B, _OF_A = range(2)


@dataclass(frozen=True, slots=True)
class Sources:
    """What `fill` reads.

    Attributes:
        key: `key_of` the product, as long as this holds.
        table: a row a part, LoRA's first.
        count: rows.
        lora: programs that LoRA's rows take.
        programs: that all take.
        tensors: what the addresses are of, save the masters.
        out: N.
        into: K.
        ranks: R.
        wide: whether LoRA stands beside the weights.
    """

    #: What a program takes: words of eight codes, 16-bit values, rows of B, values of A.
    WORDS: ClassVar[int] = 512
    VALUES: ClassVar[int] = 1024
    ROWS: ClassVar[int] = 8
    RUN: ClassVar[int] = 512

    key: tuple[float, ...]
    table: Tensor
    count: int
    lora: int
    programs: int
    tensors: tuple[Tensor, ...]
    out: int
    into: int
    ranks: int
    wide: bool

    @classmethod
    def of(cls, product: Members, ranks: int, device: torch.device) -> Sources:
        """The sources of a product whose LoRA takes `ranks` ranks."""
        rows, at = _Rows(), 0
        carried = {id(factors.member): factors for factors in product.adapters()}
        for member in product.members:
            factors = carried.get(id(member))
            if ranks:
                address = 0 if factors is None else _at(factors.b)
                where = (
                    (0, 0, 0)
                    if factors is None
                    else (factors.ranks.start, len(factors.a), _bits(factors.scaling))
                )
                programs = math.ceil(member.shape[0] / cls.ROWS)
                rows.add(programs, _B, address, at, member.shape[0], *where)
            at += member.shape[0]
        filled = 0
        for factors in carried.values():
            filled = factors.ranks.stop
            rows.add(
                math.ceil(factors.a.numel() / cls.RUN),
                _A,
                _at(factors.a),
                factors.ranks.start,
                factors.a.numel(),
            )
        if filled < ranks:
            size = (ranks - filled) * product.into
            rows.add(math.ceil(size / cls.RUN), _A, 0, filled, size)
        lora, at = rows.programs, 0
        tensors: list[Tensor] = []
        for member in product.members:
            size = member.shape[0] * product.into
            if member.nf4 is not None:
                state = member.nf4.state
                held = [member.nf4.packed, state.absmax, state.state2.absmax,
                        state.state2.code, state.offset]  # fmt: skip
                packed, *scales = map(_at, held)
                words = size // 8
                rows.add(math.ceil(words / cls.WORDS), _CODES, packed, at, words, *scales)
            else:
                assert member.weight is not None
                held = [member.weight]
                rows.add(math.ceil(size / cls.VALUES), _VALUES, _at(member.weight), at, size)
            tensors += held
            at += member.shape[0]
        return cls(
            key_of(product), rows.table(device), len(rows.rows), lora, rows.programs,
            tuple(tensors), product.out, product.into, ranks, product.wide,
        )  # fmt: skip


def key_of(product: Members) -> tuple[float, ...]:
    """What may change of a product's `Sources`: addresses, ranks, scalings."""
    key: list[float] = []
    for member in product.members:
        if member.nf4 is not None:
            key.append(_at(member.nf4.packed))
            if member.sharded:
                state = member.nf4.state
                key += [_at(state.absmax), _at(state.state2.absmax)]
        elif member.weight is not None:
            key.append(_at(member.weight))
        if member.lora is not None:
            assert member.lora_A is not None
            assert member.lora_B is not None
            key += [_at(member.lora_A), _at(member.lora_B), member.lora.r, member.lora.scaling]
    return tuple(key)


def fits(product: Members, dtype: torch.dtype) -> bool:
    """Whether a table can describe the members."""
    return (
        dtype.itemsize == 2
        and product.into % 8 == 0
        and (product.out + WIDEST) * (product.into + WIDEST) < 2**31  # counted in 32 bits
        and all(
            (member.nf4 is not None and member.shape[0] * product.into % BLOCK == 0)
            or (
                member.weight is not None
                and member.weight.dtype == dtype
                and member.weight.is_contiguous()
            )
            for member in product.members
        )
        and all(
            factors.a.dtype == factors.b.dtype == torch.float32 for factors in product.adapters()
        )
    )


@dataclass(frozen=True, slots=True)
class Gradients:
    """What `outer` writes.

    Attributes:
        key: `key_of` the gradients, as long as this holds.
        table: a row a gradient.
        count: rows.
        programs: that all take.
        widest: the most ranks of a row.
        aligned: whether all columns and ranks begin and end at multiples of 16 bytes.
        tensors: the gradients.
    """

    key: tuple[float, ...]
    table: Tensor
    count: int
    programs: int
    widest: int
    aligned: bool
    tensors: tuple[Tensor, ...]

    @staticmethod
    def key_of(
        adapters: Sequence[LoraFactors], sinks: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[float, ...]:
        """Where gradients lie, and what they are scaled by."""
        places = [_at(gradient) for pair in sinks for gradient in pair]
        return (
            *places,
            *(factors.scaling for factors in adapters),
            *(len(factors.a) for factors in adapters),
        )

    @classmethod
    def of(
        cls,
        adapters: Sequence[LoraFactors],
        sinks: Sequence[tuple[Tensor, Tensor]],
        together: Tensor | None,
        columns: int,
    ) -> Gradients:
        """The gradients of A and B of each adapter, and all of A where they are one matrix.

        Args:
            adapters: of a product.
            sinks: the gradients of A and B of each.
            together: ``[sum r, K]``, all gradients of A, where they lie end to end.
            columns: that a program takes.
        """
        rows, unscaled = _Rows(), _bits(1.0)
        into = adapters[0].a.shape[1]

        def a(to: Tensor, first: int) -> None:
            rows.add(math.ceil(into / columns), _OF_A, _at(to), 0, into,
                     first, len(to), 1, into, unscaled)  # fmt: skip

        for adapter, (of_a, of_b) in zip(adapters, sinks, strict=True):
            out, r = of_b.shape
            rows.add(math.ceil(out / columns), _OF_B, _at(of_b), adapter.rows.start, out,
                     adapter.ranks.start, r, r, 1, _bits(adapter.scaling))  # fmt: skip
            if together is None:
                a(of_a, adapter.ranks.start)
        if together is not None:
            a(together, 0)
        tensors = tuple(gradient for pair in sinks for gradient in pair)
        return cls(
            cls.key_of(adapters, sinks), rows.table(tensors[0].device), len(rows.rows),
            rows.programs, max(row[6] for row in rows.rows),
            all(number % 8 == 0 for row in rows.rows for number in row[3:7]), tensors,
        )  # fmt: skip


class MemberTables:
    """The tables of one product; each is made again when it is out of date."""

    def __init__(self) -> None:
        self._sources: list[Sources] = []
        self._gradients: Gradients | None = None

    def sources(self, product: Members, ranks: int, device: torch.device) -> Sources:
        """For weights, and LoRA of `ranks` ranks."""
        key = key_of(product)
        for known in self._sources:
            if known.ranks == ranks and known.key == key:
                return known
        made = Sources.of(product, ranks, device)
        # Sharded weights lie at a few addresses in turn. A copy of a table waits for the device.
        kept = KEPT - 1 if any(member.sharded for member in product.members) else 0
        self._sources = [made, *self._sources[:kept]]
        return made

    def gradients(self, adapters: Sequence[LoraFactors], columns: int) -> Gradients | None:
        """For the gradients of all adapters; ``None`` where not all are kept in float32."""
        sinks = sinks_of(adapters)
        if any(
            grad is None or grad.dtype != torch.float32 or not grad.is_contiguous()
            for pair in sinks
            for grad in pair
        ):
            return None
        there = cast("list[tuple[Tensor, Tensor]]", sinks)
        known = self._gradients
        if known is None or known.key != Gradients.key_of(adapters, there):
            together = neighbours([a for a, _ in sinks])
            known = self._gradients = Gradients.of(adapters, there, together, columns)
        return known


class _Rows:
    """Rows of a table that is being made."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.programs = 0

    def add(self, programs: int, *fields: int) -> None:
        self.rows.append((self.programs, *fields))
        self.programs += programs

    def table(self, device: torch.device) -> Tensor:
        filled = [[*row, *[0] * (FIELDS - len(row))] for row in self.rows]
        return torch.tensor(filled, dtype=torch.int64, device=device)


def _at(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _bits(number: float) -> int:
    """A float32 as the integer of the same bits."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])
