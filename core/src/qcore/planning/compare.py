"""Compares the memory and speed that were predicted for a run with those measured.

This file decides what is compared: peak memory allocated by torch over all steps and evaluations,
and tokens per second over all steps but the first, which compiles and warms up. On the CPU only the
resident memory of the process is known, which is reported but not compared. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .report import Plan, spelled
from .shared import SharedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The plan of a run: predicted memory and time.

    Attributes:
        worst: plan of the pack, or of the held-out row, that takes the most memory.
        usual: plan of the pack whose token count is nearest to the mean; predicts the time.
        micro_steps: mean number of micro-steps per optimizer step; with several ranks, those of
            the rank with the most work.
        by_hand: whether the settings name the policy.
        limited: whether a memory budget is known.
        together: the most tokens of micro-batches that are joined into one; 0 if none are joined.
        shared: the step of all ranks; ``None`` for a run of one process.
    """

    worst: Plan
    usual: Plan
    micro_steps: float
    by_hand: bool
    limited: bool
    together: int = 0
    shared: SharedStep | None = None

    @property
    def sharded(self) -> bool:
        """Whether the base is sharded over the ranks; otherwise each rank holds all of it."""
        return self.shared is not None and self.shared.sharded

    @property
    def policies(self) -> tuple[str, ...]:
        """The activation checkpointing policy of each layer."""
        return self.usual.policies

    @property
    def parked(self) -> int:
        """Bytes of a pinned host block for one offloaded layer input of the largest pack."""
        parks = self.policies.count("offload")
        return self.worst.host // parks if parks else 0

    @property
    def tokens_per_second(self) -> float | None:
        """Predicted throughput, of all ranks; ``None`` if no time is predicted."""
        if not self.usual.timed:
            return None
        return self.shared.tokens_per_second if self.shared else self.usual.tokens_per_second

    @property
    def seconds(self) -> float | None:
        """Predicted time of an optimizer step; ``None`` if no time is predicted."""
        if not self.usual.timed:
            return None
        return self.shared.seconds if self.shared else self.usual.seconds * self.micro_steps

    def line(self) -> str:
        """Return the plan as one line for the log of a run."""
        worst, rate = self.worst, self.tokens_per_second
        limit = f" of {worst.budget / 1e9:.1f} GB" if self.limited else ", no limit known"
        time = (
            "no time predicted"
            if rate is None
            else f"{self.seconds:.3f} s a step, {rate:,.0f} tokens/s"
        )
        if self.together:
            time += (
                f", micro-batches run together up to {self.together} tokens: "
                f"{self.micro_steps:.3g} micro-steps a step"
            )
        return (
            f"plan: recompute {spelled(self.policies)}, peak {worst.peak / 1e9:.2f} GB{limit} "
            f"({worst.moment}, {worst.pack}), {time}, "
            f"on {self.shared.where if self.shared else worst.card}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain values for manifests and ``--json``."""
        seconds, rate = self.seconds, self.tokens_per_second
        return {
            "card": self.worst.card,
            "recompute": spelled(self.policies),
            "by_hand": self.by_hand,
            "fits": self.worst.fits if self.limited else None,
            "budget_bytes": self.worst.budget if self.limited else None,
            "peak_bytes": self.worst.peak,
            "moment": self.worst.moment,
            "largest_pack": list(self.worst.lengths),
            **({"largest_pack_units": self.worst.units} if self.worst.units else {}),
            "memory_bytes": dict(self.worst.memory),
            "micro_steps": round(self.micro_steps, 3),
            "tokens_together": self.together or None,
            "host_bytes": self.worst.host,
            "seconds_per_step": None if seconds is None else round(seconds, 4),
            "tokens_per_second": None if rate is None else round(rate, 1),
            **({"ranks": self.shared.as_json()} if self.shared else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The measurement of a run in this process.

    Attributes:
        device: type of the device.
        peak: bytes; on a GPU the peak that torch allocated, on the CPU the resident set.
        tokens_per_second: over all steps but the first; ``None`` before the first step.
    """

    device: str
    peak: int
    tokens_per_second: float | None

    def as_json(self) -> dict[str, Any]:
        """Return plain values, the counterpart of `RunPlan.as_json`."""
        rate = self.tokens_per_second
        return {
            "memory": "allocated" if self.device == "cuda" else "resident",
            "peak_bytes": self.peak,
            "tokens_per_second": None if rate is None else round(rate, 1),
        }


def comparison_line(plan: RunPlan, measured: Measured) -> str:
    """Return prediction and measurement as one line for the log."""
    planned, actual = plan.worst.peak / 1e9, measured.peak / 1e9
    if not measured.peak:
        memory = f"peak {planned:.2f} GB planned, no step ran"
    elif measured.device == "cuda":
        deviation = _deviation(planned, actual)
        memory = f"peak {planned:.2f} GB planned, {actual:.2f} GB measured ({deviation})"
    else:
        memory = (
            f"peak {planned:.2f} GB of tensors planned, {actual:.2f} GB resident in the process"
        )
    expected, rate = plan.tokens_per_second, measured.tokens_per_second
    rates: Sequence[str] = (
        f"{expected:,.0f} tokens/s planned" if expected else "no time planned",
        f"{rate:,.0f} tokens/s measured" if rate else "none measured",
    )
    deviation = f" ({_deviation(expected, rate)})" if expected and rate else ""
    return f"plan and measurement: {memory}; {', '.join(rates)}{deviation}"


def _deviation(planned: float, measured: float) -> str:
    return f"plan {planned / measured - 1:+.1%}"
