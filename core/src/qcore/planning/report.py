"""`Plan`: the predicted memory and time of one step on one GPU, as a record and as JSON.

This file decides the format of a plan; `qcore.planning.step` makes it. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from .links import Gathers

Lengths = tuple[int, ...]  #: tokens of each row of a pack


class Pack(tuple[int, ...]):
    """The lengths of rows that may have media; without units it equals the plain tuple.

    Args:
        lengths: tokens of each row.
        units: media units of all rows together.

    Attributes:
        units: media units of all rows together, which the tower computes.
    """

    units: int

    def __new__(cls, lengths: Iterable[int], units: int = 0) -> Self:
        """Create a pack of rows."""
        pack = super().__new__(cls, lengths)
        pack.units = units
        return pack

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, other) is True and self.units == units_of(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), self.units)) if self.units else tuple.__hash__(self)

    def __repr__(self) -> str:
        return f"{tuple(self)!r} + {self.units} units" if self.units else repr(tuple(self))


def units_of(pack: object) -> int:
    """Return the media units of a pack; 0 for a plain tuple of lengths."""
    return pack.units if isinstance(pack, Pack) else 0


def spelled(policies: Sequence[str]) -> str:
    """Format the policies of all layers: ``full``, or ``8 full, 24 elementwise``."""
    counts = [(policy, policies.count(policy)) for policy in dict.fromkeys(policies)]
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{count} {policy}" for policy, count in counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of one step on one GPU.

    Attributes:
        card: name of the GPU.
        lengths: tokens of each row of a micro-batch; a `Pack` if the rows have media.
        policies: activation checkpointing policy of each layer, as `Model.loss` takes it.
        budget: memory budget in bytes.
        memory: bytes by term at the peak; they sum to `peak`.
        peak: predicted peak of the memory that torch allocates, in bytes.
        moment: the moment of the step at which the peak occurs.
        ops: bytes of activations and workspace at the peak, by the op that allocated them.
        seconds: time of a micro-step and its share of the optimizer update.
        launches: kernels and device operations of a micro-step.
        backends: op -> backend.
        notes: assumptions that limit the accuracy of the plan, one line each.
        host: bytes of pinned host memory for offloaded layer inputs.
        host_budget: bytes of available host memory; ``None`` if unknown.
        timed: whether `seconds` is a prediction; false on the CPU and on an unknown GPU.
        gathers: all-gathers of a sharded base; `seconds` includes what they expose.
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
    gathers: Gathers = field(default=Gathers())

    @property
    def fits(self) -> bool:
        """Whether both the peak and the offloaded inputs are within their budgets."""
        return self.peak <= self.budget and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Whether the offloaded inputs fit in host memory."""
        return self.host_budget is None or self.host <= self.host_budget

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return sum(self.lengths)

    @property
    def units(self) -> int:
        """Media units of a micro-batch."""
        return units_of(self.lengths)

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all tokens, supervised or not."""
        return self.tokens / self.seconds

    @property
    def recompute(self) -> str:
        """The policies: ``elementwise``, or ``8 full, 24 elementwise``."""
        return spelled(self.policies)

    @property
    def pack(self) -> str:
        """The rows: ``2 x 4096 tokens``, or ``3 rows of 812 tokens`` in all, and their media."""
        media = f" and {self.units:,} units of media" if self.units else ""
        if len(set(self.lengths)) == 1:
            return f"{len(self.lengths)} x {self.lengths[0]} tokens{media}"
        return f"{len(self.lengths)} rows of {self.tokens} tokens{media}"

    @property
    def largest(self) -> str:
        """The largest memory term: ``activations 8.1 GB``."""
        term, size = max(self.memory.items(), key=lambda item: item[1])
        return f"{term} {size / 1e9:.3g} GB"

    def as_json(self) -> dict[str, Any]:
        """Return plain values for ``--json``."""
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
