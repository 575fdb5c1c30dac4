"""What the guards of a training step cost on the CPU, as a share of the step.

Trains an adapter and switches the guards off in every second step of the same run: the check of
the parameters, and the scores of loss and gradient norm over a full window. Times are CPU seconds
of the process, on one thread, so that other programs on the machine do not count.

    python benchmarks/guards_cpu.py --model FOLDER --data ROWS.jsonl [--steps 80]

Prints the median of a step with and without guards, their own time, and both as shares.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


class Clock:
    """CPU seconds of steps and of the guards in them.

    Attributes:
        with_guards: seconds of each step with guards.
        without: of each step without.
        own: seconds in the guards, of each step with them.
    """

    def __init__(self) -> None:
        self.with_guards: list[float] = []
        self.without: list[float] = []
        self.own: list[float] = []
        self._on, self._spent = True, 0.0

    def step(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Time `Loop.step`; guards are on in steps of even number."""

        def timed(loop: Any, number: int) -> Any:
            self._on, self._spent = number % 2 == 0, 0.0
            if not number:
                for at in range(128):  # a full window: the price of a long run
                    loop.guard.losses.append(2.0 + at % 7 / 10)
                    loop.guard.norms.append(0.5 + at % 5 / 10)
            began = time.process_time()
            result = run(loop, number)
            (self.with_guards if self._on else self.without).append(time.process_time() - began)
            if self._on:
                self.own.append(self._spent)
            return result

        return timed

    def guard(self, run: Callable[..., Any], instead: Callable[[], Any]) -> Callable[..., Any]:
        """Time a guard where it is on; return ``instead()`` where it is off."""

        def timed(*args: Any) -> Any:
            if not self._on:
                return instead()
            began = time.process_time()
            result = run(*args)
            self._spent += time.process_time() - began
            return result

        return timed


def measure(model: str, rows: str, steps: int) -> Clock:
    """Run the steps."""
    import torch

    import qcore.training.train as training
    from qcore.config.settings import Settings
    from qcore.training.spikes import SpikeGuard
    from qcore.training.step import Loop

    torch.set_num_threads(1)
    clock, zero = Clock(), torch.zeros(())
    guarded: Any = Loop
    guarded._largest = clock.guard(Loop._largest, lambda: zero)
    scores: Any = SpikeGuard
    scores.judge = clock.guard(SpikeGuard.judge, lambda: None)
    scores.add = clock.guard(SpikeGuard.add, lambda: None)
    guarded.step = clock.step(Loop.step)
    settings = Settings(max_steps=steps, save_steps=0, publish_without_gain=True)
    with tempfile.TemporaryDirectory() as folder:
        training.train(model, rows, Path(folder) / "adapter", settings, device="cpu")
    return clock


def main() -> None:
    """Parse, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=80)
    given = parser.parse_args()
    if given.steps < 8:
        sys.exit("--steps: at least 8")
    clock = measure(given.model, given.data, given.steps)
    on, off = (statistics.median(x[2:]) for x in (clock.with_guards, clock.without))
    own = statistics.median(clock.own[2:])
    print(f"{platform.processor() or platform.machine()}, torch {version('torch')}, one thread")
    print(f"steps: {len(clock.with_guards)} with guards, {len(clock.without)} without")
    print(f"median step: {1e3 * on:.2f} ms with guards, {1e3 * off:.2f} ms without")
    print(f"ratio: {on / off:.4f}")
    print(f"guards themselves: {1e3 * own:.3f} ms, {100 * own / off:.2f} % of a step")


if __name__ == "__main__":
    main()
