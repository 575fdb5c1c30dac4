"""Measures peak memory and tokens per second over the steps of a run.

This file decides what is measured: the peak over all steps and evaluations, and tokens per
second over all steps but the first, which compiles kernels and warms up. How a measurement
compares with the plan is up to `planning.compare`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..planning.compare import Measured


@dataclass(slots=True)
class Meter:
    """Measurements of the steps that ran so far in this process.

    Attributes:
        peak: bytes: on a GPU the most that torch allocated, on the CPU the resident set.
        tokens: of the steps that are timed.
        seconds: of the same.
    """

    peak: int = 0
    tokens: int = 0
    seconds: float = 0.0
    _steps: int = field(default=0, repr=False)

    def step(self, tokens: int, seconds: float, peak: int) -> None:
        """Add a step; the time of the first is dropped as soon as there is another."""
        if self._steps == 1:
            self.tokens, self.seconds = 0, 0.0
        self._steps += 1
        self.tokens += tokens
        self.seconds += seconds
        self.saw(peak)

    def saw(self, peak: int) -> None:
        """Add a peak that belongs to no step."""
        self.peak = max(self.peak, peak)

    def measured(self, device: str) -> Measured:
        """The measurements so far, for a device of type `device`."""
        rate = self.tokens / self.seconds if self.seconds else None
        return Measured(device=device, peak=self.peak, tokens_per_second=rate)
