"""Interface and offsets of the linear layers in one fused product; `fused` computes it.

This file decides what a map must offer to be computed in a fused product (`Member`) and the
sizes that follow from a group of maps (`Members`): where each member's rows and LoRA ranks
start. It computes nothing and holds no buffer; that is `fused`.

Shapes: K in, N out of all members, R ranks of all members up to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from .lora_layer import Lora
from .nf4 import NF4


class Member(Protocol):
    """A linear map ``[..., in] -> [..., out]`` as the fused product sees it (`linear.Linear`).

    Attributes:
        shape: ``(out, in)`` of the weight.
        nf4: the weight in 4 bit, or ``None``.
        weight: the 16-bit weight ``[out, in]``, or ``None`` if it is held in 4 bit.
        lora: the adapter's numbers; ``None`` if the base alone is computed.
        lora_A: ``[r, in]``, or ``None``.
        lora_B: ``[out, r]``, or ``None``.
        lora_magnitude_vector: DoRA's m ``[out]``, or ``None``.
        resident: whether a 16-bit copy of a 4-bit weight stays in memory.
        accumulates: whether a backward may add to the gradients of `lora_A` and `lora_B` itself.
        sharded: whether the weight is whole only while its layer runs, at changing addresses.
        training: as ``nn.Module`` has it; decides on dropout.
    """

    shape: tuple[int, ...]
    nf4: NF4 | None
    weight: nn.Parameter | None
    lora: Lora | None
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    resident: bool
    accumulates: bool
    sharded: bool
    training: bool

    @property
    def four_bit(self) -> bool:
        """Whether the weight is held in 4 bit."""
        ...

    def dense(self) -> Tensor:
        """The weight ``[out, in]`` in the run's dtype."""
        ...

    def kept_norms(self) -> Tensor:
        """Norms of the rows of the weight, float32 ``[out]``, computed once."""
        ...

    def into(self, out: Tensor) -> None:
        """Write the weight into `out` ``[out, in]``, whose rows may lie apart."""
        ...


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """A and B of one member, and where they lie in the matrices of all members.

    Attributes:
        member: whose factors these are.
        rows: the member's rows of N.
        ranks: the member's ranks of R.
        a: ``[r, K]``, the trained A.
        b: ``[n, r]``, the trained B.
        scaling: what ``B A`` is multiplied by.
    """

    member: Member
    rows: slice
    ranks: slice
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def mark(self) -> tuple[Any, ...]:
        """A value that changes when A, B or the scaling does."""
        return self.a, self.a._version, self.b, self.b._version, self.scaling


class Members:
    """Linear maps of one input width, in the order of their outputs.

    Args:
        members: maps that read the same K columns.

    Attributes:
        members: the maps.
        into: K.
        sizes: rows of each member.
        out: N.

    Raises:
        ValueError: if the maps read inputs of several widths.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        widths = {member.shape[1] for member in members}
        if len(widths) != 1:
            raise ValueError(f"maps of one input must read one width, not {sorted(widths)}")
        self.into = widths.pop()
        self.sizes = [member.shape[0] for member in members]
        self.out = sum(self.sizes)

    @property
    def wide(self) -> bool:
        """Whether LoRA stands beside the weights (N >= K), not below them."""
        return self.out >= self.into

    def adapters(self) -> Iterator[LoraFactors]:
        """The factors of every member that carries LoRA, in order."""
        row = rank = 0
        for member in self.members:
            size, lora = member.shape[0], member.lora
            if lora is not None:
                assert member.lora_A is not None
                assert member.lora_B is not None
                yield LoraFactors(
                    member,
                    slice(row, row + size),
                    slice(rank, rank + lora.r),
                    member.lora_A,
                    member.lora_B,
                    lora.scaling,
                )
                rank += lora.r
            row += size
