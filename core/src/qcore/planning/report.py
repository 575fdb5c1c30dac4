"""The plan of one step on one GPU, as a record for people and programs.

This file decides the format of a plan; `qcore.planning.step` makes it. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

Lengths = tuple[int, ...]  #: of the rows of a pack


class Pack(tuple[int, ...]):
    """`Lengths` of rows that have media; without units it is, and equals, the plain tuple.

    Attributes:
        units: what a tower computes of all rows' media.
    """

    units: int

    def __new__(cls, lengths: Iterable[int], units: int = 0) -> Self:
        """A pack of rows of these lengths."""
        made = super().__new__(cls, lengths)
        made.units = units
        return made

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other) is True and self.units == units_of(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), self.units)) if self.units else tuple.__hash__(self)

    def __repr__(self) -> str:
        return f"{tuple(self)!r} + {self.units} units" if self.units else repr(tuple(self))


def units_of(pack: object) -> int:
    """Units of a pack's media; of plain lengths none."""
    return pack.units if isinstance(pack, Pack) else 0


def spelled(policies: Sequence[str]) -> str:
    """Policies of the layers for people: ``full``, or ``8 full, 24 elementwise``."""
    counts = [(policy, policies.count(policy)) for policy in dict.fromkeys(policies)]
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{count} {policy}" for policy, count in counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One step on one card.

    Attributes:
        card: its name.
        lengths: tokens of each row of a micro-batch; a `Pack` where they have media.
        policies: activation checkpointing policy of each layer; `Model.loss` takes it.
        budget: bytes that may be filled.
        memory: bytes by term, at the peak; they sum to `peak`.
        peak: the most that torch will have allocated.
        moment: when that is.
        ops: bytes of the peak's activations and workspace by op, as far as an op made them.
        seconds: of a micro-step and its share of the update.
        launches: kernels and device operations of a micro-step.
        backends: op to backend.
        notes: what the reader must know to trust it.
        host: bytes of the host's memory that are pinned for inputs of layers.
        host_budget: bytes that the host has; ``None``: not known.
        timed: whether `seconds` is a prediction; not on the CPU nor on a card of unknown rates.
    """

    card: str
    lengths: Lengths
    policies: tuple[str, ...]
    budget: int
    memory: Mapping[str, int]
    peak: int
    moment: str
    ops: Mapping[str, int]
    seconds: float
    launches: int
    backends: Mapping[str, str]
    notes: tuple[str, ...] = field(default=())
    host: int = 0
    host_budget: int | None = None
    timed: bool = True

    @property
    def fits(self) -> bool:
        """Whether the peak is within the budget, and what is parked within the host's."""
        return self.peak <= self.budget and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether the host has what is parked there."""
        return self.host_budget is None or self.host <= self.host_budget

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return sum(self.lengths)

    @property
    def units(self) -> int:
        """Units of media of a micro-batch."""
        return units_of(self.lengths)

    @property
    def tokens_per_second(self) -> float:
        """All tokens, supervised or not."""
        return self.tokens / self.seconds

    @property
    def recompute(self) -> str:
        """``elementwise``, or ``8 full, 24 elementwise``."""
        return spelled(self.policies)

    @property
    def pack(self) -> str:
        """``2 x 4096 tokens``, or ``3 rows of 812 tokens`` where they differ; and their media."""
        media = f" and {self.units:,} units of media" if self.units else ""
        if len(set(self.lengths)) == 1:
            return f"{len(self.lengths)} x {self.lengths[0]} tokens{media}"
        return f"{len(self.lengths)} rows of {self.tokens} tokens{media}"

    @property
    def largest(self) -> str:
        """The term that takes most: ``activations 8.1 GB``."""
        term, size = max(self.memory.items(), key=lambda one: one[1])
        return f"{term} {size / 1e9:.3g} GB"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "card": self.card,
            "rows": len(self.lengths),
            "max_length": max(self.lengths),
            **({"media_units": self.units} if self.units else {}),
            "recompute": self.recompute,
            "fits": self.fits,
            "budget_bytes": self.budget,
            "peak_bytes": self.peak,
            "moment": self.moment,
            "memory_bytes": dict(self.memory),
            "host_bytes": self.host,
            "ops_bytes": dict(self.ops),
            "seconds": round(self.seconds, 4) if self.timed else None,
            "tokens_per_second": round(self.tokens_per_second, 1) if self.timed else None,
            "launches": self.launches,
            "backends": dict(self.backends),
            "notes": list(self.notes),
        }
