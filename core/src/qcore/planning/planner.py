"""Searches the fastest checkpointing policies, micro-batch and longest row for a memory budget.

This file decides which layers recompute what, so that the step is as fast as the memory budget
allows. Bottom layers recompute first, because the activations of top layers are freed before the
backward of the bottom runs. It also decides the fastest micro-batch and the longest row that fits.
`qcore.planning.step` predicts one step, `qcore.planning.run` plans a run with its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Self

from ..nn.recompute import POLICIES
from .host_memory import most_pinned
from .packs import check_pack, holds
from .report import Lengths, Pack, Plan
from .shared import SharedStep
from .step import Steps

__all__ = ["Plan", "Planner"]


class Planner(Steps):
    """Plans any micro-batch and searches for the fastest policies, micro-batch or longest row."""

    def ladder(self) -> list[tuple[str, ...]]:
        """Return policies for all layers, from the fastest to those that take the least memory."""
        layers = len(self.measure.kinds)
        steps = [("none",) * layers]
        for more, less in pairwise(self.allowed()):
            steps += [(less,) * n + (more,) * (layers - n) for n in range(1, layers + 1)]
        allowed = self.allowed()
        return [policies for policies in steps if set(policies) <= set(allowed)] or [
            (allowed[0],) * layers
        ]

    def allowed(self) -> tuple[str, ...]:
        """Return the policies that the settings allow, the fastest first."""
        settings = self.settings
        if not settings.gradient_checkpointing:
            return ("none",)
        if settings.recompute != "auto":
            return (settings.recompute,)
        return POLICIES if self.device == "cuda" else POLICIES[:-1]

    @property
    def frugal(self) -> str:
        """The allowed policy that takes the least memory."""
        return self.allowed()[-1]

    def fastest(self, *packs: Lengths) -> Plan:
        """Plan the fastest policies under which all packs fit.

        Args:
            *packs: tokens of each row, for each pack.

        Returns:
            The plan of the pack with the highest peak; under the policies that take the least
            memory if not all packs fit.

        Raises:
            UsageError: ``QC-PLAN-005`` a pack has more tokens than kernels can index.
        """
        for pack in packs:
            check_pack(pack)
        steps = self.ladder()
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            if max(self.peak(pack, steps[middle]) for pack in packs) <= self.budget:
                high = middle
            else:
                low = middle + 1
        return self.worst(packs, steps[low])

    def with_any_policy(self) -> Self:
        """Return the same planner with every policy allowed."""
        other = copy(self)
        other.settings = replace(self.settings, gradient_checkpointing=True, recompute="auto")
        return other

    def shared(self, usual: Plan, packs: float, load: float, reason: str) -> SharedStep:
        """Return the step of all ranks.

        Args:
            usual: plan of a micro-step of one rank.
            packs: micro-batches of a step, over all ranks.
            load: work of the rank with the most, in micro-steps.
            reason: why the base is sharded or whole.
        """
        return SharedStep(
            ranks=self.ranks,
            sharded=self.sharding is not None,
            reason=reason,
            packs=packs,
            load=load,
            usual=usual,
            reduced=self.static["gradients"],
        )

    def best(self, length: int, rows: int, units: int = 0) -> Plan:
        """Plan the fastest micro-batch of rows of one length.

        Args:
            length: tokens of each row.
            rows: rows of an optimizer step, which all ranks share; the micro-batch size divides
                them.
            units: media units of each row.

        Returns:
            The plan of the micro-batch that fits and with which a step is fastest; of one row if
            none fits.
        """
        sizes = [n for n in range(1, min(rows, 64) + 1) if rows % n == 0]
        packs = [Pack((length,) * n, units * n) for n in sizes]
        plans = [self.fastest(pack) for pack in packs if holds(pack)]
        fitting = [plan for plan in plans if plan.fits]
        if not fitting:
            return plans[0]

        def step(plan: Plan) -> float:
            return plan.seconds * -(-(rows // len(plan.lengths)) // self.ranks.size)

        return min(fitting, key=step)

    def longest(self, policy: str | None = None, limit: int = 1 << 20, units: int = 0) -> int:
        """Return the tokens of the longest single row that fits.

        Args:
            policy: policy of all layers; by default `frugal`.
            limit: upper bound of the result.
            units: units of the row's media; their tokens are included in the result.

        Returns:
            Tokens, a multiple of 64; 0 if not even the shortest row fits.
        """
        if policy is None and self.host is not None and len(self.allowed()) > 1:
            # The policy that takes the least GPU memory may need more host memory than there is.
            return max(self.longest(other, limit, units) for other in self.allowed()[-2:])
        policies = (policy or self.frugal,) * len(self.measure.kinds)
        limit = min(limit, self._offload_limit(policies))
        least = max(64, -(-self.tokens(units) // 64) * 64)
        if limit < least:
            return 0

        def peak(tokens: int) -> int:
            return self.peak(Pack((tokens,), units), policies)

        low, high = least, min(max(4096, 2 * least), limit)
        at_low = peak(low)
        if at_low > self.budget:
            return 0
        while (at_high := peak(high)) <= self.budget:
            if high >= limit:
                return high
            low, at_low, high = high, at_high, min(4 * high, limit)
        # The peak is nearly affine in the tokens (tiles and the moment of the peak change it), so
        # secant steps converge fast; bisection steps in between guarantee termination.
        secant = True
        while high - low > 64:
            share = (self.budget - at_low) / (at_high - at_low) if secant else 0.5
            guess = (low + int(share * (high - low))) // 64 * 64
            guess, secant = min(max(guess, low + 64), high - 64), not secant
            if (at_guess := peak(guess)) <= self.budget:
                low, at_low = guess, at_guess
            else:
                high, at_high = guess, at_guess
        return low

    def tokens(self, units: int) -> int:
        """Return the number of tokens that `units` units of media become."""
        return self.measure.require_tower().tokens(units) if units else 0

    def _offload_limit(self, policies: Sequence[str]) -> int:
        """Return the most tokens, a multiple of 64, whose offloaded inputs fit in host memory."""
        offloaded = policies.count("offload") if self.device == "cuda" else 0
        if not offloaded or self.host is None:
            return 1 << 62
        width = self.measure.width * self.measure.model.dtype.itemsize
        return most_pinned(self.host, offloaded) // int(width) // 64 * 64
