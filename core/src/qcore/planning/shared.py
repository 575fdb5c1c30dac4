"""`SharedStep`: time of a step whose packs several ranks share, and how well they are used.

This file decides how the plan of one rank becomes that of all: a step takes as long as the rank
with the most work, then the ranks sum their gradients. They are one buffer, that of the optimizer,
so summing takes no memory. `qcore.planning.packs` decides the packs of a rank,
`qcore.planning.sharding` what gathering a sharded base costs. It imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .links import NCCL, Ranks
from .report import Plan

FITS = "each GPU holds the whole base, which fits"  #: why a base is not sharded
_WAITING = 0.1  # share of the time of all ranks above which waiting is reported


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedStep:
    """An optimizer step of several ranks.

    Attributes:
        ranks: the ranks and their links.
        sharded: whether the base is sharded over the ranks; otherwise each holds all of it.
        reason: why, for users.
        packs: micro-batches of a step, over all ranks.
        load: work of the rank with the most, in micro-steps of `usual`.
        usual: plan of a micro-step.
        reduced: bytes of all gradients, which the ranks sum once a step.
    """

    ranks: Ranks
    sharded: bool
    reason: str
    packs: float
    load: float
    usual: Plan
    reduced: int

    @property
    def reduce_seconds(self) -> float:
        """Seconds in which the ranks sum the gradients of a step."""
        return self.ranks.all_reduce(self.reduced)

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.usual.seconds * self.load + self.reduce_seconds

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all ranks."""
        return self.usual.tokens * self.packs / self.seconds

    @property
    def per_gpu(self) -> float:
        """Throughput of one rank."""
        return self.tokens_per_second / self.ranks.size

    @property
    def idle(self) -> float:
        """Fraction of all ranks' time in which they wait for the one with the most work."""
        return max(0.0, 1 - self.packs / (self.ranks.size * self.load))

    @property
    def idle_ranks(self) -> int:
        """Ranks that compute nothing, because a step has fewer packs than ranks."""
        return max(0, self.ranks.size - int(self.packs))

    @property
    def scaling(self) -> float:
        """Throughput divided by that of as many GPUs that neither communicate nor wait."""
        alone = self.usual.seconds - self.usual.gathers.exposed
        return alone * self.packs / self.ranks.size / self.seconds

    @property
    def where(self) -> str:
        """The GPUs and the place of the base, for users."""
        gpus = f"{self.ranks.size} x {self.usual.card}"
        return f"{gpus}, base {'sharded' if self.sharded else 'whole on each'}"

    def balance(self) -> str | None:
        """Return what to change if ranks wait for others; ``None`` if they do not."""
        size = self.ranks.size
        if self.idle_ranks:
            return (
                f"a step has {self.packs:.3g} packs for {size} ranks: {self.idle_ranks} of them "
                "compute nothing; raise gradient_accumulation_steps, lower "
                "per_device_train_batch_size, or set scale_batch=true"
            )
        if self.idle > _WAITING:
            return (
                f"ranks wait {self.idle:.0%} of the time: a step has {self.packs:.3g} packs, and "
                f"the rank with the most computes {self.load:.3g}; make "
                f"gradient_accumulation_steps a multiple of {size}, or set scale_batch=true"
            )
        return None

    def communication(self) -> str:
        """Return what the ranks exchange in a step and how long it takes."""
        gathers = self.usual.gathers
        line = (
            f"all-reduce of {_size(self.reduced)} of gradients {_time(self.reduce_seconds)} "
            f"a step over {self.ranks.slowest.name}"
        )
        if self.sharded:
            line += (
                f"; all-gathers of {_size(gathers.nbytes)} of weights "
                f"{_time(gathers.seconds)} a micro-step, which takes "
                f"{_time(gathers.exposed)} longer"
            )
        return line

    def as_json(self) -> dict[str, Any]:
        """Return plain values for manifests and ``--json``."""
        gathers, timed = self.usual.gathers, self.usual.timed

        def seconds(value: float) -> float | None:
            return round(value, 6) if timed else None

        return {
            "gpus": self.ranks.gpus,
            "nodes": self.ranks.nodes,
            "link": self.ranks.slowest.name,
            "base": "sharded" if self.sharded else "whole",
            "reason": self.reason,
            "packs": round(self.packs, 3),
            "packs_of_busiest_rank": round(self.load, 3),
            "idle_ranks": self.idle_ranks,
            "idle_fraction": round(self.idle, 4),
            "nccl_bytes": NCCL,
            "all_reduce_bytes": self.reduced,
            "all_reduce_seconds": seconds(self.reduce_seconds),
            "all_gather_bytes": gathers.nbytes,
            "all_gather_seconds": seconds(gathers.seconds),
            "all_gather_exposed_seconds": seconds(gathers.exposed),
            "seconds_per_step": seconds(self.seconds),
            "tokens_per_second": round(self.tokens_per_second, 1) if timed else None,
            "tokens_per_second_per_gpu": round(self.per_gpu, 1) if timed else None,
            "scaling": round(self.scaling, 4) if timed else None,
        }


def asked_for(sharded: bool) -> str:
    """Return the reason where the setting ``shard_base`` decides."""
    if sharded:
        return "the base is sharded, as shard_base=always asks for"
    return "each GPU holds the whole base, as shard_base=never asks for"


def too_large(plan: Plan) -> str:
    """Return the reason for a sharded base; `plan` is that of a GPU with the whole base."""
    return (
        f"the base is sharded: with all of it a GPU would need {plan.peak / 1e9:.1f} GB of "
        f"{plan.budget / 1e9:.1f} GB"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
